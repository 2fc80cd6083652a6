"""Sums and rounding exactly as ggml's C has them, over blocks that lie on lanes: [elements of a block, lanes].

ggml adds a block's products one after another in float32, the product rounded before it is added. With blocks on lanes that order is a row at a time,
which numpy's reductions over the first axis keep (torch's add in pairs). Elementwise work is torch's, in place: it is faster there, and the lock of the
interpreter is released meanwhile.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["ROUNDS_AS_RINT", "as_bytes", "column_dots", "column_sums", "divided", "first_largest", "gathered_bits", "nearest"]

ROUNDS_AS_RINT = 2.0**22  # below it ggml's nearest_int is rint
_MAGIC = 12582912.0  # 1.5 * 2^23: its sum with a small float32 has the rounded value in its low bits


def column_sums(values: Tensor, out: Tensor) -> Tensor:
    """Each lane's sum, in order."""
    np.add.reduce(values.numpy(), axis=0, out=out.numpy())
    return out


def column_dots(first: Tensor, second: Tensor, out: Tensor) -> Tensor:
    """Each lane's sum of products, in order, each product rounded."""
    if _einsum_rounds_products():
        np.einsum("ij,ij->j", first.numpy(), second.numpy(), out=out.numpy())
        return out
    return column_sums(first * second, out)


@cache
def _einsum_rounds_products() -> bool:
    """Whether this machine's numpy multiplies, rounds and then adds (as its x86 builds do: one pass where there were two), or fuses the two."""
    generator = np.random.default_rng(0)
    first, second = (generator.standard_normal((32, 1027), np.float32) for _ in range(2))
    return np.array_equal(np.einsum("ij,ij->j", first, second), np.add.reduce(first * second, axis=0))


def divided(number: float, by: Tensor, out: Tensor | None = None) -> Tensor:
    """A float32 over each value, rounded once: torch's `number / tensor` multiplies with a reciprocal."""
    return torch.div(torch.tensor(number, dtype=torch.float32), by, out=out)


def first_largest(x: Tensor, dim: int) -> Tensor:
    """Along `dim`, kept, the element of largest magnitude: the first of equals, +0.0 of zeros."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    largest = torch.where(high > -low, high, low)
    tied = ((high == -low) & (high != 0)).squeeze(dim)
    if tied.any():
        among = x.movedim(dim, -1)[tied]
        largest.movedim(dim, -1)[tied] = among.gather(1, among.abs().max(1, keepdim=True).indices)
    return largest.add_(0.0)


def nearest(values: Tensor, low: int, high: int, *, exact: bool) -> Tensor:
    """`values`, in place, rounded to even and kept within `low` and `high`. With `exact` as ggml's nearest_int does where a value is 2^22 or more or
    not finite: the low bits of a float32 sum.
    """
    if not exact:
        return values.round_().clamp_(low, high)
    bits = values.add_(_MAGIC).view(torch.int32)
    return values.copy_(bits.bitwise_and(0x7FFFFF).sub_(0x400000).clamp_(low, high))


def as_bytes(values: Tensor) -> Tensor:
    """uint8 of the same rows."""
    return values.flatten(1).view(torch.uint8)


def gathered_bits(eights: Tensor) -> Tensor:
    """A byte for each int64: bit i is the lowest bit of its byte i."""
    return ((eights & 0x0101010101010101) * 0x0102040810204080 >> 56).to(torch.uint8)
