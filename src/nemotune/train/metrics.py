"""metrics.jsonl, the record of a run, and the trackers that copy it. A resumed run replaces the rows after its checkpoint."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotune.errors import DataError
from nemotune.files import atomic_file, disk_full_is_readable

FILE = "metrics.jsonl"


class Metrics:
    """Appends rows to `run_dir/metrics.jsonl` and copies numbers to TensorBoard if asked.

    A killed process loses no row; a power cut none from before the last `sync`. One of several processes writes, the others are `silent`.
    Raises DiskFullError.
    """

    def __init__(self, run_dir: Path, trackers: Sequence[str], *, resume_step: int = 0, silent: bool = False):
        self.path, self.silent = run_dir / FILE, silent
        if silent:
            return
        kept = [row for row in read_metrics(run_dir) if row["step"] <= resume_step] if resume_step else []
        with atomic_file(self.path) as aside:
            aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        with self._disk_full_is_readable():
            self._tensorboard = TensorBoard(run_dir / "tensorboard", resume_step) if "tensorboard" in trackers else None

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append a row of `kind` train, eval, experts, warning or deadline."""
        if self.silent:
            return
        with self._disk_full_is_readable():
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
            if self._tensorboard is not None:
                numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
                self._tensorboard.write(step, numbers)

    def rows(self) -> list[dict[str, Any]]:
        """Those written so far, of the run before it was resumed too."""
        return read_metrics(self.path.parent)

    def sync(self) -> None:
        """Put the rows on the disk itself: a checkpoint counts on those before it."""
        if self.silent:
            return
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self.silent:
            return
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _disk_full_is_readable(self) -> Any:
        return disk_full_is_readable(self.path, left="what was saved before is whole. Free some space and go on with --resume")


class TensorBoard:
    """Scalars in an event file, written in this thread: that of torch's SummaryWriter prints a traceback of its own when the disk is full."""

    def __init__(self, directory: Path, resume_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((directory / name).open("wb"))
        self._add(file_version="brain.Event:2")
        if resume_step:  # TensorBoard drops what earlier files hold from this step on
            self._add(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append one value for each name."""
        values = [self._summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]
        self._add(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        self._records.close()

    def _add(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows written so far; a last line cut off by a crash is not one. Raises DataError with a line that is none."""
    path = run_dir / FILE
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    return [_parse(line, number=number, path=path) for number, line in enumerate(lines[:-1], start=1) if line]


def _parse(line: bytes, *, number: int, path: Path) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: is no row of the record ({error}); remove that line") from error
