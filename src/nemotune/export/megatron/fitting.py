"""A model's tensors on both sides held against each other: which home holds what, with every size known, every name accounted for."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from nemotune.errors import CheckpointError
from nemotune.export.megatron.homes import EMBEDDINGS, HEAD, Home
from nemotune.export.megatron.rows import Rows, cut, inverted
from nemotune.export.stream import in_threads
from nemotune.models.base import CausalLM

# Of a tensor at once: memory of 4 MB is used again and again, that of 32 MB comes anew from the system, a page at a time.
SLAB_NUMEL = 2**21
SAMPLED = 64  # parts of tensors that are compared where not all are

T = TypeVar("T", bound=tuple[Any, ...])
ReadRows = Callable[[Rows], Tensor]


@dataclass(frozen=True)
class Compared:
    """How many tensors were read back, mapped the other way and found the same bit for bit, of how many; or parts of them."""

    tensors: int
    of: int
    whole: bool


@dataclass(frozen=True)
class Fitted:
    """A home whose runs are all counted: `tail` is the shape of a row."""

    home: Home
    tail: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.home.name

    @property
    def num_rows(self) -> int:
        return sum(run.length for run in self.home.entries[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the Megatron tensor."""
        return (*((len(self.home.entries),) if self.home.stacked else ()), self.num_rows, *self.tail)


def fit(home: Home, shape_of: Callable[[str], tuple[int, ...]]) -> Fitted:
    """The home with the rows that `shape_of` says of its Hugging Face tensors. Raises ValueError where these do not go together."""
    shapes = {name: shape_of(name) for name in home.names}
    tails = {shape[1:] for shape in shapes.values()}
    if len(tails) > 1:
        raise ValueError(f"{home.name}: is made of rows of different shapes, {sorted(tails)}")
    entries = tuple(tuple(_counted(run, shapes[run.name][0]) for run in entry) for entry in home.entries)
    if len({sum(run.length for run in entry) for entry in entries}) > 1:
        raise ValueError(f"{home.name}: its entries have different numbers of rows")
    return Fitted(replace(home, entries=entries), tails.pop())


def fitted_to(home: Home, shape: tuple[int, ...], *, vocab_size: int) -> Fitted:
    """The home sized by the tensor of `shape` in it; rows behind the vocabulary are Megatron's padding. Raises ValueError where it does not fit."""
    if home.stacked and (not shape or shape[0] != len(home.entries)):
        raise ValueError(f"{home.name}: got shape {shape}, expected {len(home.entries)} entries")
    inner = shape[1:] if home.stacked else shape
    if not inner:
        raise ValueError(f"{home.name}: got a single number, expected rows")
    if home.name in (EMBEDDINGS, HEAD) and inner[0] > vocab_size:
        inner = (vocab_size, *inner[1:])
    counted = any(run.count is not None for entry in home.entries for run in entry)
    fitted = fit(home, lambda name: (sys.maxsize if counted else inner[0], *inner[1:]))
    if fitted.num_rows != inner[0]:
        raise ValueError(f"{home.name}: got {inner[0]} rows, expected {fitted.num_rows}")
    return fitted


def made_of(fitted: Iterable[Fitted]) -> tuple[dict[str, list[Rows]], list[str]]:
    """Of which rows of Megatron's tensors each Hugging Face tensor is made, in order; and which of them have gaps or overlaps."""
    rows = [(each.name, i if each.home.stacked else None, entry) for each in fitted for i, entry in enumerate(each.home.entries)]
    places: dict[str, list[tuple[int, int]]] = {}
    for _, _, entry in rows:
        for run in entry:
            places.setdefault(run.name, []).append((run.first, run.length))
    problems = []
    for name, runs in places.items():
        ends = [0, *accumulate(length for _, length in sorted(runs))]
        if [first for first, _ in sorted(runs)] != ends[:-1]:
            problems.append(f"{name}: the tensors of Megatron that it is made of have gaps or overlaps")
    return inverted(rows), problems


def rows_between(runs: Iterable[Rows], start: int, stop: int, read: ReadRows) -> Tensor:
    """Rows `start` to `stop` of what the runs make."""
    parts = [read(run) for run in cut(runs, start, stop)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def slabs(num_rows: int, tail: tuple[int, ...]) -> list[tuple[int, int]]:
    """(first row, the one after the last) of slabs of a bounded size."""
    rows = max(1, SLAB_NUMEL // max(1, math.prod(tail)))
    return [(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Bit for bit: -0.0 is not 0.0."""
    return one.shape == other.shape and one.dtype == other.dtype and _same(one, other)


def refuse(directory: Path, problems: list[str], remedy: str) -> None:
    """Raise CheckpointError with all problems, where there is one."""
    if problems:
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        listed = "\n  ".join(problems[:8])
        raise CheckpointError(f"{directory}: {len(problems)} tensors do not fit:\n  {listed}{more}\n{remedy}")


def canonical(name: str, model: CausalLM) -> str:
    """Our name of a tensor on disk."""
    for alias, prefix in model.aliases.items():
        if name.startswith(alias):
            return prefix + name.removeprefix(alias)
    return name


def compared(parts: Sequence[T], is_right: Callable[[T], bool], directory: Path, *, of: str, all_: bool) -> Compared:
    """The report on parts of tensors (name first), all of them or always the same few. Raises CheckpointError where one `is_right` not."""
    chosen = list(parts) if all_ else random.Random(0).sample(list(parts), min(SAMPLED, len(parts)))
    wrong = [part[0] for part, right in zip(chosen, in_threads(is_right, chosen), strict=True) if not right]
    if wrong:
        raise CheckpointError(
            f"{directory}: {len(set(wrong))} of {len({part[0] for part in chosen})} tensors read back are not those of {of}, first {wrong[0]}; "
            "nothing was kept. Convert again; if it repeats, disk or memory is at fault"
        )
    return Compared(len({part[0] for part in chosen}), len({part[0] for part in parts}), len(chosen) == len(parts))


def _counted(run: Rows, available: int) -> Rows:
    run = run if run.count is not None else replace(run, count=available)
    if run.first + run.length > available:
        raise ValueError(f"{run.name}: has {available} rows, expected {run.first + run.length}")
    return run


def _same(one: Tensor, other: Tensor) -> bool:
    bits = _bits(one), _bits(other)
    return torch.equal(*(bits if bits[0].dtype == bits[1].dtype else [each.view(torch.uint8) for each in bits]))


def _bits(tensor: Tensor) -> Tensor:
    """In the widest integers that fit: those compare fastest."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return flat.view(torch.int64) if len(flat) % 8 == 0 and flat.data_ptr() % 8 == 0 else flat
