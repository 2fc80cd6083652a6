"""Q8_0, Q5_0 and Q5_1: 32 values with one scale (and minimum), no search. Byte for byte what ggml's reference functions give.

The K-quants stand in for these where rows are a multiple of 256 long. Source: quantize_row_q8_0_ref and its neighbours in ggml-quants.c.
M blocks, which lie on lanes: x [32, M].
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotune.export.gguf.quants.arithmetic import divided, first_largest

__all__ = ["quantize_q5_0", "quantize_q5_1", "quantize_q8_0"]

BEFORE_HALF = 0.49999997  # the float32 before 0.5: added and cut, it rounds halves away from zero as C's roundf


def quantize_q8_0(x_MI: Tensor) -> Tensor:
    """uint8 [M, 34] of float32 [M, 32]: float16 d, 32 signed bytes."""
    x = x_MI.t().contiguous()
    d = x.abs().amax(0) / 127
    level = _scaled(x, d)
    level.add_(torch.copysign(torch.tensor(BEFORE_HALF), level))
    return torch.cat([_bytes(d), level.to(torch.int8).t().contiguous().view(torch.uint8)], dim=1)


def quantize_q5_0(x_MI: Tensor) -> Tensor:
    """uint8 [M, 22] of float32 [M, 32]: float16 d, the fifth bits, the nibbles."""
    x = x_MI.t().contiguous()
    d = first_largest(x) / -16
    levels = _scaled(x, d, shift=16.5).to(torch.uint8).clamp_(max=31)
    return torch.cat([_bytes(d), _fifth_bits_and_nibbles(levels)], dim=1)


def quantize_q5_1(x_MI: Tensor) -> Tensor:
    """uint8 [M, 24] of float32 [M, 32]: float16 d and minimum, the fifth bits, the nibbles."""
    x = x_MI.t().contiguous()
    low, high = x.aminmax(dim=0)
    d = (high - low) / 31
    levels = _scaled(x - low, d, shift=0.5).to(torch.uint8)
    return torch.cat([_bytes(d), _bytes(low), _fifth_bits_and_nibbles(levels)], dim=1)


def _scaled(x: Tensor, d: Tensor, *, shift: float = 0.0) -> Tensor:
    """x / d + shift. 0 where that is not finite, as d is too small to have an inverse: what C's conversion to an integer gives there."""
    inverse = torch.where(d == 0, 0.0, divided(1.0, d))
    scaled = (x * inverse).add_(shift)
    return scaled.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0) if inverse.isinf().any() else scaled


def _bytes(values: Tensor) -> Tensor:
    return values.half()[:, None].view(torch.uint8)


def _fifth_bits_and_nibbles(levels: Tensor) -> Tensor:
    """uint8 [M, 20] of five-bit levels [32, M]: bit i of the first four bytes is element i's; byte j of the others holds elements j and j + 16."""
    fifth = (levels >> 4).view(4, 8, -1)
    bits = fifth[:, 0].clone()
    for i in range(1, 8):
        bits |= fifth[:, i] << i
    nibbles = (levels[:16] & 15) | levels[16:] << 4
    return torch.cat([bits, nibbles]).t()
