"""Where the documents of a packed row lie, in the forms that the ops want; computed once per batch and shared by all layers.

A packed row is T tokens of documents laid end to end; `cu_seqlens` [docs + 1] holds their borders, as FlashAttention names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """Documents cut into chunks of `size` tokens, none of which crosses a border; the last of each document is padded."""

    size: int
    count: int
    slots_T: Tensor  # place of each token in the [count * size] padded layout
    first: tuple[bool, ...]  # per chunk: does it begin a document?
    last_of_document: Tensor  # [docs]: the chunk that ends each document


class Documents:
    """The documents of a row. `cu_seqlens`: int32 [docs + 1], from 0 to T, rising: no document is empty."""

    def __init__(self, cu_seqlens: Tensor):
        self.cu_seqlens = cu_seqlens
        borders = cu_seqlens.tolist()
        self.lengths: list[int] = [end - start for start, end in pairwise(borders)]
        assert borders[0] == 0 and all(length > 0 for length in self.lengths), f"cu_seqlens: got {borders}, expected 0 and then rising"
        self._chunks: dict[int, Chunks] = {}

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def positions_T(self) -> Tensor:
        """The position of each token within its document, from 0."""
        starts_T = torch.repeat_interleave(self.cu_seqlens[:-1], self._lengths_tensor)
        return torch.arange(self.num_tokens, device=self.cu_seqlens.device) - starts_T

    @cached_property
    def indices_T(self) -> Tensor:
        """The document that each token belongs to, from 0."""
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.cu_seqlens.device), self._lengths_tensor)

    def chunks(self, size: int) -> Chunks:
        """The documents in chunks of at most `size` tokens."""
        if size not in self._chunks:
            counts = [-(-length // size) for length in self.lengths]
            starts = torch.tensor([0, *counts], device=self.cu_seqlens.device).cumsum(0)
            self._chunks[size] = Chunks(
                size=size,
                count=sum(counts),
                slots_T=starts[self.indices_T] * size + self.positions_T,
                first=tuple(i == 0 for count in counts for i in range(count)),
                last_of_document=starts[1:] - 1,
            )
        return self._chunks[size]

    @cached_property
    def _lengths_tensor(self) -> Tensor:
        return self.cu_seqlens.diff()
