"""A process's piece of a packed row that the ranks of the `context` axis share, and the rows that it is given from the pieces before it.

Pieces are contiguous, in the order of the ranks, and of equal length up to one token; documents cross from one into the next. What a
piece needs of those before it are the last rows, all or some, that these have of the document in which it begins. Every rank knows from the
row's borders who needs how many, so one all-to-all moves them, and its reverse moves their gradients back.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemotune.ops.documents import Documents


class Piece(Documents):
    """The documents in piece `rank` of `ranks`, of a row with borders `cu_seqlens` [docs + 1] on the CPU.

    The first may have begun `before` tokens earlier, the last may go on; positions are those in whole documents. `tokens` and `numbers`
    say which tokens and documents of the row are here. Where the row has fewer tokens than ranks, a piece may have none: it then is a
    document of one token that is nobody's, of which no other piece knows.
    """

    def __init__(self, cu_seqlens: Tensor, device: torch.device | str | None = None, *, rank: int, ranks: int):
        row = cu_seqlens.tolist()
        self.rank, self.ranks = rank, ranks
        self.starts = [row[-1] * other // ranks for other in range(ranks + 1)]  # of each piece, then the row's end
        self._begins = [row[bisect_right(row, start) - 1] for start in self.starts]  # of the document in which each piece begins
        start, stop = self.starts[rank : rank + 2]
        self.tokens, self.is_empty = slice(start, stop), start == stop
        borders = [start, *(border for border in row if start < border < stop), stop]
        self.before = 0 if self.is_empty else start - self._begins[rank]
        first = bisect_right(row, start) - 1
        self.numbers = slice(first, first + len(borders) - 1)
        self._borders_here = [0, 1] if self.is_empty else [border - start for border in borders]
        super().__init__(torch.tensor(self._borders_here, dtype=torch.int32), device)
        self._extended: dict[int, Documents] = {}

    @cached_property
    def positions_T(self) -> Tensor:
        """The position of each token within its whole document."""
        return super().positions_T + self.before * (self.indices_T == 0)

    def extended(self, earlier: int) -> Documents:
        """The same documents, the first with so many tokens before those that are here."""
        if earlier not in self._extended:
            borders = [0, *(border + earlier for border in self._borders_here[1:])]
            self._extended[earlier] = Documents(torch.tensor(borders, dtype=torch.int32), self.cu_seqlens.device)
        return self._extended[earlier]

    def reach(self, giver: int, taker: int, at_most: int | None = None) -> int:
        """How many of its last tokens piece `giver` has among the `at_most` tokens, or all, that the first document of `taker` has before it."""
        start, stop = self.starts[taker : taker + 2]
        if giver >= taker or start == stop:
            return 0
        begin = self._begins[taker] if at_most is None else max(self._begins[taker], start - at_most)
        return max(0, self.starts[giver + 1] - max(self.starts[giver], begin))

    def traffic(self, at_most: int | None = None) -> Traffic:
        """Who gives whom how many rows, so that each piece has the `at_most`, or all, that its first document has before it."""
        everyone = range(self.ranks)
        return Traffic(
            [self.reach(self.rank, taker, at_most) for taker in everyone], [self.reach(giver, self.rank, at_most) for giver in everyone]
        )


class Traffic(NamedTuple):
    """Rows that go to each rank, and that come from each."""

    sent: list[int]
    received: list[int]

    def capped(self) -> Traffic:
        """One row at most from each to each: what sums up a piece."""
        return Traffic([min(1, rows) for rows in self.sent], [min(1, rows) for rows in self.received])


def rows_before(x_TX: Tensor, traffic: Traffic, group: Any) -> Tensor:
    """What `traffic` says that this rank receives, in order [received, X]. To each rank goes as many of the last rows of x as it says.

    Every rank of `group` calls it at the same time, and where it has a gradient its backward too, whatever there is to move.
    """
    sent = torch.cat([x_TX[len(x_TX) - rows :] for rows in traffic.sent])
    return _AllToAll.apply(sent, traffic, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, traffic: Traffic, group: Any) -> Tensor:
        ctx.traffic, ctx.group = traffic, group
        return _all_to_all(rows, traffic.sent, traffic.received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _all_to_all(gradient, ctx.traffic.received, ctx.traffic.sent, ctx.group), None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result
