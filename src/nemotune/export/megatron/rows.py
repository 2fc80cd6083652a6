"""Runs of rows, of which a tensor on one side is made of tensors on the other; which they are is in `homes.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rows:
    """`count` rows of a tensor from `first` on, of its entry `entry` where it is a stack; None: all rows there are."""

    name: str
    first: int = 0
    count: int | None = None
    entry: int | None = None

    @property
    def length(self) -> int:
        assert self.count is not None, f"{self.name}: sizes are not known yet"
        return self.count


def cut(runs: Iterable[Rows], start: int, stop: int) -> Iterator[Rows]:
    """Rows `start` to `stop` of what the runs make one after another."""
    at = 0
    for run in runs:
        begin, end = max(start - at, 0), min(stop - at, run.length)
        if begin < end:
            yield replace(run, first=run.first + begin, count=end - begin)
        at += run.length


def inverted(made: Iterable[tuple[str, int | None, Sequence[Rows]]]) -> dict[str, list[Rows]]:
    """From (tensor, entry, the runs that it is made of) to what each tensor of the other side is made of; gaps and overlaps are the caller's."""
    found: dict[str, list[tuple[int, Rows]]] = {}
    for name, entry, runs in made:
        at = 0
        for run in runs:
            found.setdefault(run.name, []).append((run.first, Rows(name, at, run.length, entry)))
            at += run.length
    return {name: [run for _, run in sorted(parts, key=lambda part: part[0])] for name, parts in found.items()}
