"""metrics.jsonl, the record of a run, and the trackers that copy it. A resumed run replaces the rows after its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotune.files import atomic_file

FILE = "metrics.jsonl"


class Metrics:
    """Appends rows to `run_dir/metrics.jsonl`, each on disk before the next step, and copies numbers to TensorBoard if asked."""

    def __init__(self, run_dir: Path, trackers: Sequence[str], *, resume_step: int = 0):
        run_dir.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(run_dir) if row["step"] <= resume_step] if resume_step else []
        with atomic_file(run_dir / FILE) as aside:
            aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = (run_dir / FILE).open("a", encoding="utf-8")
        self._tensorboard = _tensorboard(run_dir, resume_step) if "tensorboard" in trackers else None

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a row of `kind` train, eval or warning."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows written so far; a last line cut off by a crash is not one."""
    path = run_dir / FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _tensorboard(run_dir: Path, resume_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)
