"""`Stream`: the rows of a blend in the order of training. It stands where a Split of prepared rows does, and is read in place.

Row n of the run comes from the dataset that is due by the weights, and is that dataset's next one: both by arithmetic, so that a run is
resumed anywhere, on any number of processes, and a trillion tokens take no preparation. Which documents make a row is said in `rows.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nemotune.data.megatron.indexed import IndexedDataset
from nemotune.data.megatron.mock import MockDataset
from nemotune.data.megatron.rows import Row, Rows
from nemotune.data.split import Document
from nemotune.errors import DataError
from nemotune.recipe.blend import MOCK

PERIOD = 1 << 20  # rows after which the turns of the datasets repeat: weights are kept to a millionth
PARTS = 1 << 22  # document number = row x PARTS + place in the row


@dataclass(frozen=True)
class Part:
    """Tokens `begin` to `end` of a dataset; `weight` is its share of the rows."""

    prefix: str
    begin: int
    end: int
    weight: float


@dataclass(frozen=True)
class Settings:
    """What a stream is made with. `num_rows`: of what the loader calls an epoch; `vocab_size`, `end`: of the tokenizer."""

    num_rows: int
    sequence_length: int
    packed: bool
    seed: int
    vocab_size: int
    end: int


class Stream:
    """Documents by number, `packs[n]` the documents of row n, for any n: rows do not end. Files are opened when the first row is read."""

    in_order = True  # the rows come shuffled: the loader takes them as they come

    def __init__(self, parts: Sequence[Part], settings: Settings) -> None:
        self.parts, self.settings = tuple(parts), settings
        self.packs: Sequence[np.ndarray] = _Packs(self)
        self._turns = Turns([part.weight for part in parts])
        self._latest: tuple[int, int, Row] | None = None

    def __getitem__(self, number: int) -> Document:
        row, part = divmod(number, PARTS)
        place, documents = self.row(row)
        dataset = self._rows[place].dataset
        spans = documents[part]
        tokens = np.concatenate([dataset.read(start, end) for start, end in spans]).astype(np.int64)
        require_known(tokens, dataset.prefix, vocab_size=self.settings.vocab_size)
        return Document(tokens.astype(np.int32), np.ones(len(tokens), dtype=bool), row)

    def row(self, number: int) -> tuple[int, Row]:
        """The dataset of row `number`, by its place among the parts, and its documents."""
        if self._latest is None or self._latest[0] != number:
            place, at = self._turns[number]
            self._latest = (number, place, self._rows[place][at])
        return self._latest[1:]

    @property
    def shares(self) -> list[float]:
        """The share of the rows that each part gives."""
        return self._turns.shares

    @cached_property
    def _rows(self) -> list[Rows]:
        settings = self.settings
        return [
            Rows(
                open_dataset(part.prefix, settings, verify=False), begin=part.begin, end=part.end,
                sequence_length=settings.sequence_length, packed=settings.packed, key=(settings.seed, place),
            )
            for place, part in enumerate(self.parts)
        ]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """What `from_json` makes the stream of again."""
        return {"settings": vars(self.settings), "parts": [vars(part) for part in self.parts]}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Stream:
        """The stream that `to_json` was of."""
        return cls([Part(**part) for part in found["parts"]], Settings(**found["settings"]))


class _Packs(Sequence[np.ndarray]):
    """The document numbers of each row; its length is the epoch's."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __len__(self) -> int:
        return self._stream.settings.num_rows

    def __getitem__(self, index):  # type: ignore[override]
        return index * PARTS + np.arange(len(self._stream.row(index)[1]))


class Turns:
    """Which dataset row n is from, and which of its rows: `turns[n]`. Weights are positive; after any number of rows each dataset has had
    its share to within a few rows, as with megatron-core's blending, and a pass over `PERIOD` rows has it to the row."""

    def __init__(self, weights: Sequence[float]) -> None:
        shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        ends = np.rint(np.cumsum(shares) * PERIOD).astype(np.int64)
        self._counts = np.maximum(np.diff(ends, prepend=0), 1)
        places = np.repeat(np.arange(len(weights), dtype=np.int32), self._counts)
        within = np.arange(len(places)) - np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
        order = np.argsort((within + 0.5) / self._counts[places], kind="stable")
        self._places, self._within = places[order], within[order].astype(np.int32)

    def __getitem__(self, number: int) -> tuple[int, int]:
        period, at = divmod(number, len(self._places))
        place = int(self._places[at])
        return place, period * int(self._counts[place]) + int(self._within[at])

    @property
    def shares(self) -> list[float]:
        """The share of the rows that each dataset gets."""
        return (self._counts / self._counts.sum()).tolist()


def open_dataset(prefix: str, settings: Settings, *, verify: bool) -> IndexedDataset | MockDataset:
    """The dataset of that prefix, or the mock one. Raises MissingFileError, DataError."""
    if prefix == MOCK:
        return MockDataset(seed=settings.seed, vocab_size=settings.vocab_size, end=settings.end)
    dataset = IndexedDataset(prefix, verify=verify)
    if dataset.dtype.kind not in "iu":
        raise DataError(f"{prefix}.idx: holds {dataset.dtype}, expected whole numbers: tokens; name another dataset")
    if verify:
        for sample in dataset.samples():
            require_known(sample, prefix, vocab_size=settings.vocab_size)
    return dataset


def require_known(tokens: np.ndarray, prefix: str, *, vocab_size: int) -> None:
    """Raise DataError for tokens that the tokenizer does not have: no model has a row for them."""
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise DataError(
            f"{prefix}: got the token ids {tokens.min()} to {tokens.max()}, expected 0 to {vocab_size - 1}: it was written with another "
            "tokenizer than that of model.path; index its texts anew, or name the model whose tokens they are"
        )
