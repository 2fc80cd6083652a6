"""Q4_K and Q5_K: 256 values as 8 sub-blocks of 32, each with a 6-bit scale and minimum. Byte for byte what ggml's reference functions give.

The search tries 21 or 16 step widths per sub-block and keeps the one of least weighted squared error; a kept one's minimum feeds the next try. It runs
on all lanes at once and rounds with rint, which is ggml's rounding there: a minimum of more than half the range up would miss the lowest value by more
than the first try misses all, so levels stay below twice their number. Super-blocks where the search's own levels are the result (their scale rounds to
zero, as where numbers are too small to be computed with), or where the last rounding may leave rint's range, are few and are done again exactly.
Source: quantize_row_q4_K_ref and make_qkx2_quants in ggml-quants.c.

N super-blocks, J = 8 sub-blocks of I = 32 elements, M = N J lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nemotune.export.gguf.quants.arithmetic import ROUNDS_AS_RINT, as_bytes, column_dots, column_sums, divided, nearest

__all__ = ["Q4_K", "Q5_K", "Grid", "quantize_k"]

SUB_BLOCKS, SUB_BLOCK = 8, 32


@dataclass(frozen=True)
class Grid:
    """The levels that a sub-block's values get, and the step widths that are tried: (first + 0.1 s + levels) to the range."""

    levels: int
    first: float
    last_step: int

    @property
    def whole(self) -> Tensor:
        return torch.tensor(self.levels, dtype=torch.float32)

    @property
    def widths(self) -> tuple[Tensor, ...]:
        """Float32 each: a number would be multiplied by an inverse where it is to be divided."""
        steps = torch.arange(self.last_step + 1, dtype=torch.float32)
        return ((torch.tensor(0.1) * steps + self.first) + self.levels).unbind()


Q4_K = Grid(levels=15, first=-1.0, last_step=20)
Q5_K = Grid(levels=31, first=-0.5, last_step=15)


@dataclass(frozen=True)
class Found:
    """Of each lane: what the search kept; the largest magnitude; whether all values are equal. `levels` [I, M] if exact."""

    scale: Tensor
    minimum: Tensor
    largest: Tensor
    flat: Tensor
    levels: Tensor | None


def quantize_k(x_NK: Tensor, grid: Grid, *, exact: bool = False) -> Tensor:
    """uint8 [N, 144 or 176] of float32 [N, 256]."""
    x_MI = x_NK.view(-1, SUB_BLOCK)
    found = search(x_MI.t().contiguous(), grid, exact=exact)
    d, scales = _six_bits(found.scale)
    dmin, minima = _six_bits(found.minimum.neg())
    step = (d.float() * scales).flatten()
    offset = (dmin.float() * minima).flatten()
    levels = nearest((x_MI + offset[:, None]).div_(step[:, None]), 0, grid.levels, exact=exact)
    kept = step == 0
    if kept.any():
        levels[kept] = 0.0 if found.levels is None else found.levels[:, kept].t()
    packed = _pack(d, dmin, scales, minima, levels.to(torch.int8).view(-1, SUB_BLOCKS, SUB_BLOCK), five_bits=grid.levels > 15)
    redo = torch.where(kept, ~found.flat, ~((found.largest + offset) / step < ROUNDS_AS_RINT / 2)).view(-1, SUB_BLOCKS).any(1)
    if not exact and redo.any():
        packed[redo] = quantize_k(x_NK[redo], grid, exact=True)
    return packed


def search(x: Tensor, grid: Grid, *, exact: bool) -> Found:
    """Scale and minimum of each lane of [I, M]."""
    lanes = x.shape[1]
    level, product, w = (torch.empty_like(x) for _ in range(3))
    mean = column_sums(torch.mul(x, x, out=level), x.new_empty(lanes)).div_(SUB_BLOCK)
    torch.abs(x, out=w).add_(torch.from_numpy(np.sqrt(mean.numpy())))  # torch's root is not always the nearest float32
    sums, terms = x.new_empty(5, lanes), x.new_empty(2, 3, lanes)
    sum_x, sum_l, sum_xl, sum_l2, sum_w = sums
    column_sums(w, sum_w)
    column_dots(w, x, sum_x)
    kept, tried = x.new_empty(3, lanes), x.new_empty(3, lanes)
    (least, scale, low), (error, new_scale, new_low) = kept, tried
    lowest, high = x.amin(0), x.amax(0)
    torch.clamp(lowest, max=0, out=low)
    span, better, solvable = high - low, *torch.empty(2, lanes, dtype=torch.bool)
    flat, inverse = span == 0, torch.div(grid.whole, span)
    torch.reciprocal(inverse, out=scale)

    def round_levels() -> None:
        nearest(torch.sub(x, low, out=level).mul_(inverse), 0, grid.levels, exact=exact)

    def weigh(scale: Tensor, low: Tensor, out: Tensor) -> None:
        """Errors; uses `level` up."""
        level.mul_(scale).add_(low).sub_(x)
        column_dots(w, level.mul_(level), out)

    round_levels()
    levels = level.clone() if exact else None
    weigh(scale, low, least)
    for width in grid.widths:
        torch.sub(high, low, out=span)
        torch.div(width, span, out=inverse)
        round_levels()
        column_sums(torch.mul(w, level, out=product), sum_l)
        column_dots(product, x, sum_xl)
        column_dots(product, level, sum_l2)
        determinant = _fit(sums, terms, out=tried[1:])
        candidate = level.clone() if exact else None
        weigh(new_scale, new_low, error)
        torch.lt(error, least, out=better).logical_and_(torch.gt(determinant, 0, out=solvable))
        torch.where(better, tried, kept, out=kept)
        if candidate is not None:
            levels = torch.where(better, candidate, levels)
    return Found(scale, low, torch.maximum(high, -lowest), flat, levels)


def _fit(sums: Tensor, terms: Tensor, *, out: Tensor) -> Tensor:
    """Scale and minimum of least weighted squared error into `out` [2, M], the minimum at most 0. Returns the determinant.

    `sums` are those of w times x, l, x l, l^2 and 1; `terms` [2, 3, M] are overwritten.
    """
    sum_x, sum_l, sum_xl, sum_l2, sum_w = sums
    left, right = terms
    torch.mul(sums[2:4], sum_w, out=left[:2])
    torch.mul(sum_l2, sum_x, out=left[2])
    left.sub_(torch.mul(sums[:3], sum_l, out=right))
    torch.div(left[::2], left[1], out=out)
    above = out[1] > 0
    if above.any():
        out[0].copy_(torch.where(above, sum_xl / sum_l2, out[0]))
        out[1].masked_fill_(above, 0)
    return left[1]


def _six_bits(values_M: Tensor) -> tuple[Tensor, Tensor]:
    """float16 [N, 1], the largest of a super-block over 63, and each value's share of the largest in six bits, float32 [N, J]."""
    values = values_M.view(-1, SUB_BLOCKS)
    largest = values.amax(1, keepdim=True).clamp_(min=0).add_(0.0)  # no -0.0
    inverse = torch.where(largest > 0, divided(63.0, largest), 0.0)
    wrapped = nearest(inverse * values, -(2**30), 2**30, exact=True).to(torch.int32).bitwise_and_(255)  # a C uint8
    return (largest / 63).half(), wrapped.clamp_(max=63).float()


def _pack(d: Tensor, dmin: Tensor, scales_NJ: Tensor, minima_NJ: Tensor, levels_NJI: Tensor, *, five_bits: bool) -> Tensor:
    """uint8 [N, bytes]: d, dmin, 12 bytes of scales, the fifth bits of Q5_K, then 64 elements to 32 bytes, the low nibble first."""
    s, m = scales_NJ.to(torch.uint8), minima_NJ.to(torch.uint8)
    parts = [as_bytes(d), as_bytes(dmin)]
    parts += [s[:, :4] | (s[:, 4:] >> 4) << 6, m[:, :4] | (m[:, 4:] >> 4) << 6, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4]
    eights = levels_NJI.view(torch.int64)
    if five_bits:
        fifth = eights >> 4 & 0x0101010101010101
        parts.append(as_bytes(sum((fifth[:, j] << j for j in range(1, SUB_BLOCKS)), fifth[:, 0])))
        eights = eights & 0x0F0F0F0F0F0F0F0F
    return torch.cat([*parts, as_bytes(eights[:, 0::2] | eights[:, 1::2] << 4)], dim=1)
