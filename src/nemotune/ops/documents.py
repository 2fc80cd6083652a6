"""Where the documents of a packed row lie, in the forms that the ops want; computed once per batch and shared by all layers.

A packed row is T tokens of documents laid end to end; `cu_seqlens` [docs + 1] holds their borders, as FlashAttention names it.
Borders on the CPU are read there, those on a device once, when `Documents` is made; nothing later waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ChunkBorders:
    """Where the chunks of a row lie, for kernels: tensors on its device, int32."""

    size: int  # of the longest
    chunks: Tensor  # [chunks + 1]: the first token of each, then T
    documents: Tensor  # [docs + 1]: the first chunk of each, then how many there are


class Documents:
    """The documents of a row on `device`. `cu_seqlens`: int32 [docs + 1], from 0 to T, rising: no document is empty."""

    def __init__(self, cu_seqlens: Tensor, device: torch.device | str | None = None):
        self.cu_seqlens = cu_seqlens.to(device, non_blocking=True)
        borders = cu_seqlens.tolist()
        self.lengths: list[int] = [end - start for start, end in pairwise(borders)]
        assert borders[0] == 0 and all(length > 0 for length in self.lengths), f"cu_seqlens: got {borders}, expected 0 and then rising"
        self._borders: dict[int, ChunkBorders] = {}
        self._chunks: dict[int, list[list[slice]]] = {}

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

    def chunks(self, size: int) -> list[list[slice]]:
        """Of each document, its tokens in chunks of at most `size`."""
        if size not in self._chunks:
            borders = [0, *accumulate(self.lengths)]
            self._chunks[size] = [
                [slice(first, min(first + size, end)) for first in range(start, end, size)] for start, end in pairwise(borders)
            ]
        return self._chunks[size]

    def chunk_borders(self, size: int) -> ChunkBorders:
        """The row in chunks of at most `size` tokens, none across a border. Made on the device, which is not waited for."""
        if size not in self._borders:
            counts = (self.cu_seqlens.diff() + size - 1).div(size, rounding_mode="floor")
            documents = F.pad(counts.cumsum(0), (1, 0))
            num_chunks = sum(-(-length // size) for length in self.lengths)
            document_of = torch.repeat_interleave(counts.long(), output_size=num_chunks)
            place = torch.arange(num_chunks, device=counts.device) - documents[document_of]
            chunks = F.pad(self.cu_seqlens[document_of] + place * size, (0, 1), value=self.num_tokens)
            self._borders[size] = ChunkBorders(size, chunks.int(), documents.int())
        return self._borders[size]
