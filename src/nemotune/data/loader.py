"""Batches: flat rows of tokens with document borders. A pure function of the step, so that resuming is starting at another one.

Shapes: T tokens of a micro batch, all documents end to end; `cu_seqlens` [documents + 1] holds their borders. Nothing is padded.
Not here: which documents share a packed row (`packing.py`), or how a loss is averaged over a global batch (train/).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from nemotune.data.megatron.stream import Stream
from nemotune.data.split import Split

IGNORED = -100  # a target that no loss counts, as torch's cross_entropy has it
FILLER = -1  # the document of a row that is nobody's


@dataclass(frozen=True)
class Batch:
    """One micro batch.

    tokens_T int64; cu_seqlens int32, from 0 to T; targets_T int64: the NEXT token where that one is supervised, else -100, never
    across a border; document_ids [documents] int64: each document's number in its split.
    """

    tokens_T: Tensor
    cu_seqlens: Tensor
    targets_T: Tensor
    document_ids: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})

    @property
    def num_tokens(self) -> int:
        return self.tokens_T.numel()

    @property
    def num_supervised(self) -> int:
        return int((self.targets_T != IGNORED).sum())

    @property
    def is_filler(self) -> bool:
        return bool((self.document_ids == FILLER).all())


def filler() -> Batch:
    """A row that counts for nothing, for a process that has no row left while others have."""
    return Batch(
        tokens_T=torch.zeros(2, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
        targets_T=torch.full((2,), IGNORED),
        document_ids=torch.tensor([FILLER]),
    )


def collate(split: Split | Stream, documents: Sequence[int]) -> Batch:
    """The documents end to end as one Batch."""
    found = [split[int(index)] for index in documents]
    borders = np.cumsum([0] + [len(document.tokens) for document in found])
    tokens = np.concatenate([document.tokens for document in found]).astype(np.int64)
    supervised = np.concatenate([document.mask for document in found])
    supervised[borders[:-1]] = False  # nothing inside a document precedes its first token
    targets = np.full_like(tokens, IGNORED)
    targets[:-1] = np.where(supervised[1:], tokens[1:], IGNORED)
    return Batch(
        tokens_T=torch.from_numpy(tokens),
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        targets_T=torch.from_numpy(targets),
        document_ids=torch.tensor([int(index) for index in documents], dtype=torch.int64),
    )


class Loader:
    """Micro batches of each global step, over packs in an order drawn from (seed, epoch).

    Every pack is seen exactly once an epoch; the last step of an epoch holds what is left and may be smaller. `hand` (index, number of
    hands) gives one of several processes its share: micro batches are dealt in turn, and a hand with one less gets a filler. A split that
    says `in_order` (a blend, `megatron/stream.py`) has shuffled its packs itself.
    """

    def __init__(
        self,
        split: Split | Stream,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        shuffle: bool = True,
        hand: tuple[int, int] = (0, 1),
    ) -> None:
        self.hand = hand
        self.split, self.seed, self.shuffle = split, seed, shuffle and not split.in_order
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.steps_per_epoch = -(-len(split.packs) // global_batch_size)
        self._order: tuple[int, np.ndarray] | None = None

    def step(self, index: int) -> list[Batch]:
        """The micro batches of global step `index`, counted from 0 over all epochs."""
        epoch, at = divmod(index, self.steps_per_epoch)
        first = at * self.global_batch_size
        packs = self.order(epoch)[first : first + self.global_batch_size]
        micro = [packs[i : i + self.micro_batch_size] for i in range(0, len(packs), self.micro_batch_size)]
        return [
            filler() if group is None else collate(self.split, np.concatenate([self.split.packs[int(pack)] for pack in group]))
            for group in deal(micro, *self.hand)
        ]

    def order(self, epoch: int) -> Sequence[int] | np.ndarray:
        """The pack numbers of an epoch, in the order in which they are seen. Those of a stream go on where the epoch before ended."""
        count = len(self.split.packs)
        if self.split.in_order:
            return range(epoch * count, (epoch + 1) * count)
        if not self.shuffle:
            return range(count)
        if self._order is None or self._order[0] != epoch:
            # RandomState: NumPy froze its stream, so a resumed run sees the same order after an upgrade
            self._order = (epoch, np.random.RandomState([self.seed, epoch]).permutation(count))
        return self._order[1]


T = TypeVar("T")


def deal(things: Sequence[T], hand: int, hands: int) -> list[T | None]:
    """What goes to `hand` of `hands`, in turn, and None where it gets one less than another."""
    dealt: list[T | None] = list(things[hand::hands])
    return dealt + [None] * (-(-len(things) // hands) - len(dealt))


def batches(split: Split, *, max_tokens: int) -> Iterator[Batch]:
    """Every document once, in order, as many to a batch as `max_tokens` holds (a longer one alone): for evaluation."""
    group: list[int] = []
    total = 0
    for index in range(len(split)):
        length = len(split[index].tokens)
        if group and total + length > max_tokens:
            yield collate(split, group)
            group, total = [], 0
        group.append(index)
        total += length
    if group:
        yield collate(split, group)
