"""An adapter's values by module, whatever form they lie in on disk (`forms.py`), and what they make of a weight. Reading files is `adapter.py`'s."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import torch
from torch import Tensor

from nemotune.lora.layers import scale
from nemotune.recipe import Lora

PAIRS_IN_MEMORY = 4  # the experts of one module are asked for one after the other, and its two modules in turn


@dataclass(frozen=True)
class Adapter:
    """By the name of the adapted module: A [..., rank, in] and B [..., out, rank], DoRA's magnitudes, what holds for it.

    A pair is read when it is asked for. Embeddings are read as the linear layer of their weight [vocabulary, hidden]: their update is `B A` too.
    `dtype` holds every value exactly: that of all tensors, F32 where they have several.
    """

    lora: Lora
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    magnitudes: dict[str, Tensor]
    settings: dict[str, Lora]
    dtype: str = "F32"

    def delta(self, module: str, expert: int | None = None, rows: slice = slice(None)) -> Tensor:
        """What is added to (those rows of) a module's weight, or of one expert's, fp32."""
        A, B = self.pairs[module] if expert is None else (t[expert] for t in self.pairs[module])
        return (B[rows].float() @ A.float()).mul_(scale(self.settings[module]))

    def updated(self, weight: Tensor, module: str, expert: int | None = None, *, start: int = 0) -> Tensor:
        """The weight (or that of one expert) as the adapter makes it, fp32; given are its rows from `start` on. DoRA's rows are measured in fp64."""
        rows = slice(start, start + len(weight))
        updated = weight.float() + self.delta(module, expert, rows)
        if module not in self.magnitudes:
            return updated
        return updated * gains(self.magnitudes[module][rows], updated).float()


class Pairs(Mapping[str, tuple[Tensor, Tensor]]):
    """Pairs that are read when they are asked for, by one thread for all that ask; the last few are kept."""

    def __init__(self, readers: Mapping[str, Callable[[], tuple[Tensor, Tensor]]]):
        self._readers = readers
        self._read = lru_cache(PAIRS_IN_MEMORY)(lambda name: readers[name]())
        self._locks = {name: Lock() for name in readers}

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        with self._locks[name]:
            return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def gains(magnitude: Tensor, updated: Tensor) -> Tensor:
    """What DoRA multiplies the rows of the updated weight by, fp64 [out, 1]; a row of zeros stays one."""
    norms = torch.linalg.vector_norm(updated, dim=1, dtype=torch.float64).clamp(min=torch.finfo(torch.float32).tiny)
    return (magnitude.double() / norms).unsqueeze(1)
