"""Q6_K: 256 values as 16 sub-blocks of 16, each with an 8-bit signed scale. Byte for byte what ggml's reference function gives.

Nineteen step widths are tried per sub-block, weighted with x^2. Source: quantize_row_q6_K_ref and make_qx_quants in ggml-quants.c.

N super-blocks, J = 16 sub-blocks of I = 16 elements, M = N J lanes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotune.export.gguf.quants.arithmetic import ROUNDS_AS_RINT, column_dots, divided, first_largest, nearest

__all__ = ["quantize_q6_k"]

SUB_BLOCKS, SUB_BLOCK = 16, 16
TINY = 1e-15  # ggml's GROUP_MAX_EPS: a sub-block below it is zero
STEPS = [torch.tensor(0.1) * s for s in range(-9, 10) if s]


def quantize_q6_k(x_NK: Tensor, *, exact: bool = False) -> Tensor:
    """uint8 [N, 210] of float32 [N, 256]."""
    x_IM = x_NK.reshape(-1, SUB_BLOCK).t().contiguous()
    largest = first_largest(x_IM)
    scale, inverse = search(x_IM, largest, exact=exact)
    scale_NJ = scale.view(-1, SUB_BLOCKS)
    top = scale_NJ.gather(1, scale_NJ.abs().nan_to_num(nan=0.0, posinf=torch.inf).argmax(1, keepdim=True))
    zero = ~(top.abs() >= TINY)  # also where squares overflowed to NaN everywhere
    inverse_top = divided(-128.0, top)
    d = torch.where(zero, 0.0, divided(1.0, inverse_top)).half()
    scales = nearest(inverse_top * scale_NJ, -(2**30), 127, exact=True).masked_fill_(zero, 0).to(torch.int32).to(torch.int8)
    step = (d.float() * scales).flatten()
    kept = step == 0
    redo = ~kept & ~((largest / step).abs() < ROUNDS_AS_RINT / 2)
    levels = nearest(x_IM / step, -32, 31, exact=exact).add_(32)
    if kept.any():  # the search's own levels; none for zeros
        own = nearest(x_IM[:, kept] * inverse[kept], -32, 31, exact=True).add_(32)
        levels[:, kept] = own.masked_fill_((largest.abs() < TINY)[kept] | zero.expand(-1, SUB_BLOCKS).flatten()[kept], 0)
    packed = _pack(levels.to(torch.uint8), scales, d)
    rows = redo.view(-1, SUB_BLOCKS).any(1)
    if not exact and rows.any():
        packed[rows] = quantize_q6_k(x_NK[rows], exact=True)
    return packed


def search(x: Tensor, largest: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Each lane's scale, and the inverse of the step that it was found with."""
    lanes = x.shape[1]
    level, w, wx = torch.empty_like(x), x * x, x * x * x
    sum_xl, sum_l2 = x.new_empty(lanes), x.new_empty(lanes)

    def weigh(inverse: Tensor) -> None:
        nearest(torch.mul(x, inverse, out=level), -32, 31, exact=exact)
        column_dots(wx, level, sum_xl)
        column_dots(w * level, level, sum_l2)

    kept = x.new_empty(3, lanes)  # rows: scale, scale times sum_xl, inverse
    tried = x.new_empty(3, lanes)

    def rate(found: Tensor) -> None:
        torch.div(sum_xl, sum_l2, out=found[0])
        torch.mul(found[0], sum_xl, out=found[1])

    weigh(divided(-32.0, largest, out=kept[2]))
    rate(kept)
    kept[:2].masked_fill_(sum_l2 == 0, 0)
    for step in STEPS:
        weigh(torch.div(-(step + 32), largest, out=tried[2]))
        rate(tried)
        better = (sum_xl * sum_xl > kept[1] * sum_l2).logical_and_(sum_l2 > 0)
        torch.where(better, tried, kept, out=kept)
    return kept[0].masked_fill_(largest.abs() < TINY, 0), kept[2]


def _pack(levels_IM: Tensor, scales_NJ: Tensor, d: Tensor) -> Tensor:
    """uint8 [N, 210]: low nibbles, high pairs of bits, scales, d; per 128 values four rows of 32."""
    q = levels_IM.view(SUB_BLOCK, -1, 2, 4, 2).permute(1, 2, 3, 4, 0).reshape(-1, 2, 4, 32)
    low = (q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4
    high = q[:, :, 0] >> 4 | (q[:, :, 1] >> 4) << 2 | (q[:, :, 2] >> 4) << 4 | (q[:, :, 3] >> 4) << 6
    return torch.cat([low.flatten(1), high.flatten(1), scales_NJ.view(torch.uint8), d.view(torch.uint8)], dim=1)
