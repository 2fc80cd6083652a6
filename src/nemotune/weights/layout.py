"""Which part of a whole tensor a process holds: ranges along each dim, in the order in which they lie there.

One description serves reading weights, drawing adapters, adding up gradients, checkpoints and saving. It knows shapes, never processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

Range = tuple[int, int]  # first index, and the one after the last


@dataclass(frozen=True)
class Box:
    """A block without gaps: where it begins in the whole tensor, where in the part, and how large it is along each dim."""

    whole: tuple[int, ...]
    here: tuple[int, ...]
    size: tuple[int, ...]

    def of_whole(self, tensor: Tensor) -> Tensor:
        """The block as a view of the whole tensor."""
        return tensor[tuple(slice(start, start + size) for start, size in zip(self.whole, self.size, strict=True))]

    def of_part(self, tensor: Tensor) -> Tensor:
        """The block as a view of the part."""
        return tensor[tuple(slice(start, start + size) for start, size in zip(self.here, self.size, strict=True))]


@dataclass(frozen=True)
class Layout:
    """The part of a tensor of `shape` whose indices lie, dim by dim, in `ranges`."""

    shape: tuple[int, ...]
    ranges: tuple[tuple[Range, ...], ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Layout:
        """Everything."""
        return cls(tuple(shape), tuple(((0, size),) for size in shape))

    def along(self, dim: int, ranges: Sequence[Range]) -> Layout:
        """The same part but for `dim`, of which it holds `ranges`."""
        dim %= len(self.shape)
        return replace(self, ranges=(*self.ranges[:dim], tuple(ranges), *self.ranges[dim + 1 :]))

    def rows(self, start: int, stop: int) -> Layout:
        """Of this part, its own rows `start` to `stop` along dim 0."""
        found, at = [], 0
        for first, last in self.ranges[0]:
            begin, end = max(start - at, 0), min(stop - at, last - first)
            if begin < end:
                found.append((first + begin, first + end))
            at += last - first
        return self.along(0, found)

    def place_of(self, row: int) -> int | None:
        """Where row `row` of the whole lies in this part, or None."""
        at = 0
        for first, last in self.ranges[0]:
            if first <= row < last:
                return at + row - first
            at += last - first
        return None

    def of_row(self) -> Layout:
        """The layout of one of its rows."""
        return Layout(self.shape[1:], self.ranges[1:])

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.ranges)

    @property
    def is_whole(self) -> bool:
        return self == Layout.whole(self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.local_shape)

    def boxes(self) -> Iterator[Box]:
        """The blocks that make up the part; of a number (no dims) one."""
        placed = []
        for ranges in self.ranges:
            at, along = 0, []
            for start, stop in ranges:
                along.append((start, at, stop - start))
                at += stop - start
            placed.append(along)
        for places in product(*placed):
            yield Box(*(tuple(place[i] for place in places) for i in range(3)))

    def take(self, whole: Tensor) -> Tensor:
        """The part of `whole`, in memory of its own unless it is everything."""
        assert tuple(whole.shape) == self.shape, f"got {tuple(whole.shape)}, expected {self.shape}"
        if self.is_whole:
            return whole
        part = torch.empty(self.local_shape, dtype=whole.dtype, device=whole.device)
        for box in self.boxes():
            box.of_part(part).copy_(box.of_whole(whole))
        return part

    def put(self, part: Tensor, whole: Tensor) -> None:
        """Write the part into its place in `whole`."""
        for box in self.boxes():
            box.of_whole(whole).copy_(box.of_part(part))
