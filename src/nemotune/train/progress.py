"""The progress of a training run: step, loss, tokens per second, peak memory, time left. A bar, or lines where there is no terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nemotune.data.progress import Clock


class StepBar:
    """A bar on `console`, which is stderr's; a log gets the first step, a line every half a minute, and at the end the last step."""

    def __init__(self, console: Console, *, total: int, done: int):
        columns = TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn()
        self._console, self._clock = console, Clock()
        self._begun, self._step, self._total = done, done, total
        self._progress = Progress(*columns, console=console, transient=False, disable=not console.is_terminal)
        self._task = self._progress.add_task("train", total=total, completed=done, status="")
        self._numbers, self._note, self._told = "", "", ""

    def __enter__(self) -> StepBar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._numbers and self._status() != self._told:
            self._print()
        self._progress.stop()

    def advance(self, *, loss: float, tokens_per_second: float, memory_bytes: int) -> None:
        """One step done."""
        self._numbers = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {memory_bytes / 1e9:.1f} GB"
        self._step += 1
        self._progress.update(self._task, advance=1, status=f"{self._numbers}{self._note}")
        if self._step == self._begun + 1 or self._clock.line_is_due():
            self._print()

    def note(self, text: str) -> None:
        """Words that stay behind the numbers until the next ones."""
        self._note = f"  {text}"
        self._progress.update(self._task, status=f"{self._numbers}{self._note}")

    def _status(self) -> str:
        return f"step {self._step:,} of {self._total:,}: {self._numbers}{self._note}"

    def _print(self) -> None:
        if self._console.is_terminal:
            return
        self._told = self._status()
        left = self._clock.left(done=self._step - self._begun, total=self._total - self._begun)
        self._console.print(f"{self._told}  {left}", markup=False, highlight=False, soft_wrap=True)
