"""Q8_0, Q5_0 and Q5_1: 32 values with one scale (and minimum), no search. Byte for byte what ggml's reference functions give.

They stand in for the K-quants where rows are no multiple of 256 long. Source: quantize_row_q8_0_ref and its neighbours in ggml-quants.c.
Blocks are rows here, x [M, 32], as nothing is summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotune.export.gguf.quants.arithmetic import as_bytes, divided, first_largest, gathered_bits

__all__ = ["quantize_q5_0", "quantize_q5_1", "quantize_q8_0"]

BEFORE_HALF = 0.49999997  # the float32 before 0.5: added and cut, it rounds halves away from zero as C's roundf
NIBBLES = 0x0F0F0F0F0F0F0F0F  # of the eight bytes in an int64


def quantize_q8_0(x: Tensor) -> Tensor:
    """uint8 [M, 34]: float16 d, 32 signed bytes."""
    d = x.abs().amax(1, keepdim=True) / 127
    levels = _scaled(x, d)
    levels.add_(torch.copysign(torch.tensor(BEFORE_HALF), levels))
    return torch.cat([as_bytes(d.half()), as_bytes(levels.to(torch.int8))], dim=1)


def quantize_q5_0(x: Tensor) -> Tensor:
    """uint8 [M, 22]: float16 d, the fifth bits, the nibbles."""
    d = first_largest(x, dim=1) / -16
    levels = _scaled(x, d, shift=16.5).to(torch.int8).clamp_(max=31)
    return torch.cat([as_bytes(d.half()), *_five_bits(levels)], dim=1)


def quantize_q5_1(x: Tensor) -> Tensor:
    """uint8 [M, 24]: float16 d and minimum, the fifth bits, the nibbles."""
    low = _smallest(x)
    d = (x.amax(1, keepdim=True) - low).add_(0.0) / 31  # no -0.0
    levels = _scaled(x - low, d, shift=0.5).to(torch.int8)
    return torch.cat([as_bytes(d.half()), as_bytes(low.half()), *_five_bits(levels)], dim=1)


def _smallest(x: Tensor) -> Tensor:
    """Of each row, kept; of zeros the first, whose sign is written."""
    low = x.amin(1, keepdim=True)
    zero = (low == 0)[:, 0]
    if zero.any():
        among = x[zero]
        low[zero] = among.gather(1, (among == 0).to(torch.uint8).argmax(1, keepdim=True))
    return low


def _scaled(x: Tensor, d: Tensor, *, shift: float = 0.0) -> Tensor:
    """x / d + shift. 0 where that is not finite, as d is too small to have an inverse: what C's conversion to an integer gives there."""
    inverse = torch.where(d == 0, 0.0, divided(1.0, d))
    scaled = (x * inverse).add_(shift)
    return scaled.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0) if inverse.isinf().any() else scaled


def _five_bits(levels: Tensor) -> list[Tensor]:
    """The four bytes of fifth bits, element i's at bit i, and the sixteen of nibbles, byte j holding elements j and j + 16."""
    eights = levels.view(torch.int64)
    nibbles = eights & NIBBLES
    return [gathered_bits(eights >> 4), as_bytes(nibbles[:, :2] | nibbles[:, 2:] << 4)]
