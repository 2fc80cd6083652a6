"""Where the documents of a packed row lie, in the forms that the ops want; computed once per batch and shared by all layers.

A packed row is T tokens of documents laid end to end; `cu_seqlens` [docs + 1] holds their borders, as FlashAttention names it.
The borders are read from the device once, when `Documents` is made; nothing later waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """A stretch of the row in chunks of at most `size` tokens, none of which crosses a border; each is padded to `size`."""

    size: int
    tokens: slice  # the stretch
    slots_T: Tensor  # place of each of its tokens in the [count * size] padded layout
    first: tuple[bool, ...]  # per chunk: does it begin a document?
    last: tuple[bool, ...]  # ... does it end one?


class Documents:
    """The documents of a row. `cu_seqlens`: int32 [docs + 1], from 0 to T, rising: no document is empty."""

    def __init__(self, cu_seqlens: Tensor):
        self.cu_seqlens = cu_seqlens
        borders = cu_seqlens.tolist()
        self.lengths: list[int] = [end - start for start, end in pairwise(borders)]
        assert borders[0] == 0 and all(length > 0 for length in self.lengths), f"cu_seqlens: got {borders}, expected 0 and then rising"
        self._chunks: dict[tuple[int, int], list[Chunks]] = {}

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def positions_T(self) -> Tensor:
        """The position of each token within its document, from 0."""
        return torch.arange(self.num_tokens, device=self.cu_seqlens.device) - self.cu_seqlens[:-1][self.indices_T]

    @cached_property
    def indices_T(self) -> Tensor:
        """The document that each token belongs to, from 0."""
        return torch.repeat_interleave(self.cu_seqlens.diff().long(), output_size=self.num_tokens)

    def chunks(self, size: int, limit: int) -> list[Chunks]:
        """The row in chunks of at most `size` tokens, at most `limit` of them together."""
        if (size, limit) not in self._chunks:
            counts = (self.cu_seqlens.diff() + size - 1).div(size, rounding_mode="floor")
            slots_T = F.pad(counts.cumsum(0), (1, 0))[self.indices_T] * size + self.positions_T
            starts = [(start, length) for length in self.lengths for start in range(0, length, size)]
            borders = list(accumulate((min(size, length - start) for start, length in starts), initial=0))
            first, last = tuple(start == 0 for start, _ in starts), tuple(start + size >= length for start, length in starts)
            self._chunks[size, limit] = [
                Chunks(size, tokens, slots_T[tokens] - begin * size, first[begin : begin + limit], last[begin : begin + limit])
                for begin in range(0, len(starts), limit)
                for tokens in [slice(borders[begin], borders[min(begin + limit, len(starts))])]
            ]
        return self._chunks[size, limit]
