"""The few rows that a report shows in full: some where tuning helped, some where it hurt, some where it changed nothing.

They are the first of each kind in source order, not the best looking, and stand beside the counts of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemotune.evaluate.compare import judged_by
from nemotune.evaluate.rows import Row

__all__ = ["Kind", "Sample", "choose_samples"]

SHOWN = {"improved": 3, "worse": 2, "both wrong": 2, "both right": 1, "unchanged": 1}


@dataclass(frozen=True)
class Sample:
    """One item as both models answered it; `base` is None where only the tuned one was asked."""

    tuned: Row
    base: Row | None

    @property
    def metric(self) -> str:
        """The score that the item is judged by."""
        return judged_by(self.tuned.task, self.tuned.scores)

    @property
    def outcome(self) -> str:
        """improved, worse, both wrong, both right, or unchanged where both are in part, by `metric`."""
        before, after = ((row or self.tuned).scores[self.metric] for row in (self.base, self.tuned))
        if before == after:
            return {0: "both wrong", 1: "both right"}.get(after, "unchanged")
        return "improved" if after > before else "worse"


@dataclass(frozen=True)
class Kind:
    """The outcomes of one task: how many there are of each, and the samples shown."""

    task: str
    counts: dict[str, int]
    samples: tuple[Sample, ...]


def choose_samples(base: Sequence[Row], tuned: Sequence[Row]) -> list[Kind]:
    """Per task that has answers to read, the samples to show; `base` may be empty."""
    before = {row.key: row for row in base}
    tasks = dict.fromkeys(row.task for row in tuned if row.expected)
    return [_kind(task, [Sample(row, before.get(row.key)) for row in tuned if row.task == task]) for task in tasks]


def _kind(task: str, samples: list[Sample]) -> Kind:
    by_outcome = {outcome: [sample for sample in samples if sample.outcome == outcome] for outcome in SHOWN}
    shown = tuple(sample for outcome, limit in SHOWN.items() for sample in by_outcome[outcome][:limit])
    return Kind(task, {outcome: len(found) for outcome, found in by_outcome.items()}, shown)
