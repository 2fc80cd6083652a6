"""The account of rows that were not used: counted by reason, written one a line, and too many of them stop the run."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, TextIO

from nemotune.data.example import RowError
from nemotune.errors import DataError

SHOWN = 5  # rows named for each reason


class Rejects:
    """Rejected rows of one source. A row over the length limit is written and counted too, but is no bad row."""

    def __init__(self, source: str, file: TextIO) -> None:
        self.source, self.bad = source, 0
        self._file = file
        self._rows: dict[str, list[tuple[int, str]]] = defaultdict(list)
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, row: int, error: RowError, *, bad: bool = True) -> None:
        """Count one row, and write its line."""
        self.bad += bad
        self._counts[error.reason] += 1
        if len(self._rows[error.reason]) < SHOWN:
            self._rows[error.reason].append((row, error.detail))
        line = {"source": self.source, "row": row, "reason": error.reason, "detail": error.detail}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def check(self, *, rows: int, limit: float) -> None:
        """Raise DataError with the reasons and examples when more than a `limit` share of `rows` is bad."""
        if self.bad <= limit * rows:
            return
        raise DataError(
            f"data.max_bad_rows: {self.bad} of {rows} rows of data.{self.source} ({self.bad / rows:.1%}) cannot be used, "
            f"expected at most {limit:.1%}:\n"
            + "\n".join(f"  {self._told(reason)}" for reason in self._by_count())
            + "\nMend the rows, choose another data.format or data.template, or raise data.max_bad_rows."
        )

    def summary(self) -> dict[str, Any]:
        """{reason: {"count", "rows": the first few}}, the most frequent first."""
        return {reason: {"count": self._counts[reason], "rows": [row for row, _ in self._rows[reason]]} for reason in self._by_count()}

    def _by_count(self) -> list[str]:
        return sorted(self._counts, key=lambda reason: -self._counts[reason])

    def _told(self, reason: str) -> str:
        rows = self._rows[reason]
        detail = f" ({rows[0][1]})" if rows[0][1] else ""
        others = "".join(f", {row}" for row, _ in rows[1:])
        return f"{self._counts[reason]} x {reason}: row {rows[0][0]}{detail}{others}"


def read_rejected(path: Path) -> list[dict[str, Any]]:
    """The lines of a rejected.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
