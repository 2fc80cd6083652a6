"""The bar of a training run: step, loss, tokens per second, peak memory, time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StepBar:
    """A rich progress bar on the console's stream; plain logs get nothing but the metrics file."""

    def __init__(self, console: Console, *, total: int, done: int):
        columns = TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn()
        self._progress = Progress(*columns, console=console, transient=False)
        self._task = self._progress.add_task("train", total=total, completed=done, status="")
        self._note = ""

    def __enter__(self) -> StepBar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self, *, loss: float, tokens_per_second: float, memory_bytes: int) -> None:
        """One step done."""
        status = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {memory_bytes / 1e9:.1f} GB{self._note}"
        self._progress.update(self._task, advance=1, status=status)

    def note(self, text: str) -> None:
        """Words that stay behind the numbers until the next ones."""
        self._note = f"  {text}"
