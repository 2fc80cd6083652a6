"""`Rows`: one dataset's rows of `sequence_length` tokens, each found by its number alone: no index over documents or rows is built.

The dataset's tokens, in the order of the file, are cut into blocks that make `BLOCK_ROWS` rows each. Inside a block the documents are
shuffled, then

- packed: each is whole in one row, next to others that it does not see; only one longer than a row, one that crosses the border of two
  blocks, and the few small ones that fill the last gaps are cut;
- concatenated: they stand end to end and are cut every `sequence_length` tokens, as in Megatron's GPTDataset; no borders.

Rows are seen in an order that is shuffled over the whole dataset. An epoch sees every token once, except that a dataset of one token more
than its rows hold lacks that; the next epoch shuffles anew, in the blocks and over them. All of it follows from (seed, epoch) by arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from nemotune.data.megatron.indexed import IndexedDataset
from nemotune.data.megatron.mock import MockDataset
from nemotune.data.packing import pack

BLOCK_ROWS = 16  # rows that share their documents: more cut fewer documents at borders, and cost more for each row that is read
CACHED_BLOCKS = 1024
ROUNDS = 6  # of the Feistel network
MASK = (1 << 64) - 1

Span = tuple[int, int]  # tokens of the dataset, from and to
Row = list[list[Span]]  # its documents, each of one span, or of several that stand end to end


class Rows:
    """Tokens `begin` to `end` of `dataset`, `num_rows` rows an epoch. `key` seeds the order: (train.seed, the dataset's place in the blend)."""

    def __init__(
        self, dataset: IndexedDataset | MockDataset, *, begin: int, end: int, sequence_length: int, packed: bool, key: tuple[int, int]
    ) -> None:
        self.dataset, self.begin, self.end = dataset, begin, end
        self.sequence_length, self.packed, self.key = sequence_length, packed, key
        self.num_rows = count_rows(end - begin, sequence_length)
        self._block = lru_cache(maxsize=CACHED_BLOCKS)(self._make_block)

    def __getitem__(self, number: int) -> Row:
        """Row `number`, counted over all epochs."""
        epoch, at = divmod(number, self.num_rows)
        block, row = divmod(permuted(at, self.num_rows, key=(*self.key, epoch)), BLOCK_ROWS)
        return self._block(epoch, block)[row]

    def _make_block(self, epoch: int, block: int) -> list[Row]:
        width = BLOCK_ROWS * self.sequence_length
        start = self.begin + block * width
        num_rows = min(BLOCK_ROWS, self.num_rows - block * BLOCK_ROWS)
        end = min(self.end, start + num_rows * self.sequence_length)
        borders = np.unique(np.concatenate([[start], self.dataset.starts(start, end), [end]]))
        spans = np.stack([borders[:-1], borders[1:]], axis=1)
        spans = spans[np.random.RandomState([*self.key, epoch, block]).permutation(len(spans))]
        if self.packed:
            return pack_whole(_pieces(spans, self.sequence_length), num_rows, capacity=self.sequence_length)
        return concatenate(spans, num_rows, width=self.sequence_length)


def count_rows(num_tokens: int, sequence_length: int) -> int:
    """Rows that `num_tokens` make, the last one shorter; one token alone has nothing to predict and makes none."""
    return -(-(num_tokens - 1) // sequence_length) if num_tokens > 1 else 0


def permuted(index: int, count: int, *, key: Sequence[int]) -> int:
    """Where `index` of 0 to `count` - 1 goes in a shuffle drawn by `key`: a Feistel network, walked until it lands inside.

    Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains". It needs no memory, where a permutation of a billion rows is 8 GB.
    """
    half = max(1, -(-(count - 1).bit_length() // 2))
    low = (1 << half) - 1
    keys = [_mixed(part + (number << 40)) for number, part in enumerate(key)]
    while True:
        left, right = index >> half, index & low
        for round_ in range(ROUNDS):
            drawn = round_ + right
            for part in keys:
                drawn = _mixed(drawn ^ part)
            left, right = right, left ^ drawn & low
        index = left << half | right
        if index < count:
            return index


def _mixed(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def _pieces(spans: np.ndarray, length: int) -> np.ndarray:
    """The spans [n, 2], those over `length` cut into pieces of it and what remains."""
    counts = -(-(spans[:, 1] - spans[:, 0]) // length)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(spans[:, 0], counts) + within * length
    return np.stack([starts, np.minimum(starts + length, np.repeat(spans[:, 1], counts))], axis=1)


def pack_whole(spans: np.ndarray, num_rows: int, *, capacity: int) -> list[Row]:
    """Documents [n, 2] in `num_rows` rows, the fewest that have room for all: best fit, and what is left over is cut to fill gaps."""
    groups = pack((spans[:, 1] - spans[:, 0]).tolist(), capacity=capacity)
    documents = [(int(start), int(end)) for start, end in spans]
    rows = [[[documents[index]] for index in group] for group in groups[:num_rows]]
    rooms = [capacity - sum(end - start for [(start, end)] in row) for row in rows]
    for start, end in (documents[index] for group in groups[num_rows:] for index in group):
        while start < end:
            row = max(range(num_rows), key=rooms.__getitem__)
            cut = min(end, start + rooms[row])
            rows[row].append([(start, cut)])
            rooms[row] -= cut - start
            start = cut
    return rows


def concatenate(spans: np.ndarray, num_rows: int, *, width: int) -> list[Row]:
    """The documents [n, 2] end to end, cut into rows of `width`, each one document of several spans."""
    ends = np.cumsum(spans[:, 1] - spans[:, 0])
    cuts = np.unique(np.concatenate([[0], ends, np.arange(1, num_rows) * width]))
    owner = np.searchsorted(ends, cuts[:-1], side="right")
    starts = spans[owner, 1] - (ends[owner] - cuts[:-1])
    rows: list[Row] = [[[]] for _ in range(num_rows)]
    for at, start, length in zip(cuts[:-1].tolist(), starts.tolist(), np.diff(cuts).tolist(), strict=True):
        rows[at // width][0].append((start, start + length))
    return rows
