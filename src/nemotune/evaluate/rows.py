"""`Row`: one scored item of one task, as it stands in eval/<label>.jsonl; and `HeldOut`: the rows that base and tuned are both asked.

Tasks make Rows, compare.py pairs those of two models, report.py shows a few to people.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nemotune.data.example import Example
from nemotune.data.split import Document, Split
from nemotune.errors import DataError, MissingFileError
from nemotune.files import atomic_file

__all__ = ["HeldOut", "Row", "groups_of", "hold_out", "read_rows", "write_rows"]

GROUPS = ("subject", "group")  # keys of an example's meta by which scores are also given apart


@dataclass(frozen=True)
class Row:
    """`row` is the number in the source, `part` the turn or document of it; a metric's value is the mean of its scores by `weight`.

    A metric that does not apply to an item is left out of its `scores`. The texts are for people.
    """

    task: str
    row: int
    scores: dict[str, float]
    part: int = 0
    weight: float = 1.0
    groups: dict[str, str] = field(default_factory=dict)
    prompt: str = ""
    expected: str = ""
    prediction: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        """What pairs the base's row with the tuned one's."""
        return self.task, self.row, self.part


@dataclass(frozen=True)
class HeldOut:
    """The examples to ask about, and the tokenised documents that they became."""

    examples: Sequence[Example]
    documents: Sequence[Document]


def hold_out(split: Split, *, max_samples: int | None, seed: int) -> HeldOut:
    """`max_samples` rows of `split` drawn by `seed` (all where None), in source order: the same for every model of a recipe."""
    examples = list(split.examples())
    if max_samples is not None and max_samples < len(examples):
        kept = sorted(random.Random(seed).sample(range(len(examples)), max_samples))
        examples = [examples[index] for index in kept]
    rows = {example.meta["row"] for example in examples}
    documents = [document for document in map(split.__getitem__, range(len(split))) if document.row in rows]
    return HeldOut(examples, documents)


def groups_of(example: Example) -> dict[str, str]:
    """The groups that the example's row names itself a member of."""
    return {key: str(example.meta[key]) for key in GROUPS if example.meta.get(key)}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object per line, atomically."""
    with atomic_file(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def read_rows(path: Path) -> list[Row]:
    """What `write_rows` wrote. Raises MissingFileError, DataError with the line that is not a row."""
    if not path.is_file():
        raise MissingFileError(f"{path}: not there; `nemotune eval` writes it")
    with path.open("rb") as file:
        return [_parse(line, number=number, path=path) for number, line in enumerate(file, start=1)]


def _parse(line: bytes, *, number: int, path: Path) -> Row:
    try:
        return Row(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}, line {number}: is not an evaluation row ({error}); evaluate again to write it anew") from error
