"""Q6_K: 256 values as 16 sub-blocks of 16, each with an 8-bit signed scale. Byte for byte what ggml's reference function gives.

Nineteen step widths are tried per sub-block, weighted with x^2. Source: quantize_row_q6_K_ref and make_qx_quants in ggml-quants.c.

N super-blocks, J = 16 sub-blocks of I = 16 elements, M = N J lanes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotune.export.gguf.quants.arithmetic import ROUNDS_AS_RINT, as_bytes, column_dots, divided, first_largest, nearest

__all__ = ["quantize_q6_k"]

SUB_BLOCKS, SUB_BLOCK = 16, 16
TINY = 1e-15  # ggml's GROUP_MAX_EPS: a sub-block below it is zero
STEPS = [torch.tensor(0.1) * s for s in range(-9, 10) if s]


def quantize_q6_k(x_NK: Tensor, *, exact: bool = False) -> Tensor:
    """uint8 [N, 210] of float32 [N, 256]."""
    x_MI = x_NK.view(-1, SUB_BLOCK)
    x_IM = x_MI.t().contiguous()
    largest = first_largest(x_IM, dim=0)[0]
    scale, inverse = search(x_IM, largest, exact=exact)
    d, scales = _eight_bits(scale.view(-1, SUB_BLOCKS))
    step = (d.float() * scales).flatten()
    levels = nearest(x_MI / step[:, None], -32, 31, exact=exact).add_(32).to(torch.int8)
    kept = step == 0
    if kept.any():  # the search's own levels; 0 where there are none
        own = nearest(x_MI[kept] * inverse[kept, None], -32, 31, exact=True).add_(32).to(torch.int8)
        levels[kept] = own.masked_fill_((largest[kept].abs() < TINY)[:, None], 0)
        levels.view(len(d), -1).masked_fill_((d == 0) & (scales == 0).all(1, keepdim=True), 0)
    packed = _pack(levels.view(-1, 256), scales, d)
    redo = (~kept & ~((largest / step).abs() < ROUNDS_AS_RINT / 2)).view(-1, SUB_BLOCKS).any(1)
    if not exact and redo.any():
        packed[redo] = quantize_q6_k(x_NK[redo], exact=True)
    return packed


def search(x: Tensor, largest: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Of each lane of [I, M] the scale, and the inverse of the step that it was found with."""
    lanes = x.shape[1]
    level, product, w = torch.empty_like(x), torch.empty_like(x), x * x
    wx = w * x
    sum_xl, sum_l2 = x.new_empty(lanes), x.new_empty(lanes)

    def weigh(found: Tensor) -> None:
        """Fill the rows scale and scale times sum_xl from that of the inverse."""
        nearest(torch.mul(x, found[2], out=level), -32, 31, exact=exact)
        column_dots(wx, level, sum_xl)
        column_dots(torch.mul(w, level, out=product), level, sum_l2)
        torch.mul(torch.div(sum_xl, sum_l2, out=found[0]), sum_xl, out=found[1])

    kept, tried = x.new_empty(3, lanes), x.new_empty(3, lanes)  # rows: scale, scale times sum_xl, inverse
    divided(-32.0, largest, out=kept[2])
    weigh(kept)
    for step in STEPS:
        torch.div(-(step + 32), largest, out=tried[2])
        weigh(tried)
        torch.where(sum_xl * sum_xl > kept[1] * sum_l2, tried, kept, out=kept)  # sum_l2 > 0: the largest has a level
    return kept[0].masked_fill_(largest.abs() < TINY, 0), kept[2]


def _eight_bits(scale_NJ: Tensor) -> tuple[Tensor, Tensor]:
    """float16 [N, 1] and int8 [N, J]: the scale of largest magnitude is -128. Zeros where all are below `TINY`."""
    top = scale_NJ.gather(1, scale_NJ.abs().nan_to_num(nan=0.0, posinf=torch.inf).argmax(1, keepdim=True))
    zero = ~(top.abs() >= TINY)  # also where squares overflowed to NaN everywhere
    inverse = divided(-128.0, top)
    scales = nearest(inverse * scale_NJ, -(2**30), 127, exact=True).masked_fill_(zero, 0)
    return divided(1.0, inverse).masked_fill_(zero, 0).half(), scales.to(torch.int32).to(torch.int8)


def _pack(levels: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """uint8 [N, 210]: low nibbles, high pairs of bits, scales, d. Of 128 values four rows of 32 share their bytes."""
    q = levels.view(torch.int64).view(-1, 2, 4, 4)
    nibbles, pairs = q & 0x0F0F0F0F0F0F0F0F, q >> 4 & 0x0303030303030303
    low = nibbles[:, :, :2] | nibbles[:, :, 2:] << 4
    high = pairs[:, :, 0] | pairs[:, :, 1] << 2 | pairs[:, :, 2] << 4 | pairs[:, :, 3] << 6
    return torch.cat([as_bytes(low), as_bytes(high), as_bytes(scales), as_bytes(d)], dim=1)
