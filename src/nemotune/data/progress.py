"""Progress on stderr: a bar with rate and time left. Where stderr is no terminal, a plain line every half a minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column
from rich.text import Text

LINE_SECONDS = 30.0  # between two plain lines


class Clock:
    """The time since work began, and when the next plain line is due."""

    def __init__(self) -> None:
        self._begun = self._told = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def line_is_due(self) -> bool:
        """True once in LINE_SECONDS."""
        now = time.monotonic()
        due = now - self._told >= LINE_SECONDS - 1e-6
        self._told = now if due else self._told
        return due

    def left(self, *, done: int, total: int) -> str:
        """The time that `total - done` more will take at the rate so far, as h:mm:ss."""
        return f"{timedelta(seconds=round((total - done) * self.seconds / done))} left"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


@contextmanager
def progress(description: str, *, total: int | None = None, in_bytes: bool = False) -> Iterator[Callable[[int], None]]:
    """Yield a function that moves on by a number of rows, or of bytes; without a total it counts and spins."""
    console, clock, done = Console(stderr=True, soft_wrap=True, highlight=False), Clock(), 0
    what, whole = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)), Column(no_wrap=True)
    counted = (DownloadColumn(table_column=whole), TransferSpeedColumn(table_column=whole)) if in_bytes else (MofNCompleteColumn(), _Rate())
    columns = (SpinnerColumn(), what, BarColumn(), *counted, TimeRemainingColumn())

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        bar.advance(task, rows)
        if not console.is_terminal and clock.line_is_due():
            console.print(_line(description, clock, done=done, total=total, in_bytes=in_bytes), markup=False)

    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield advance


@contextmanager
def waiting(description: str, clock: Clock) -> Iterator[None]:
    """For work that cannot say how far it is: the time that it has taken, or a line where the work before it, by `clock`, had lines as well."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if not console.is_terminal and clock.line_is_due():
        console.print(description, markup=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(description, total=None)
        yield


def _line(description: str, clock: Clock, *, done: int, total: int | None, in_bytes: bool) -> str:
    rate = done / clock.seconds
    if in_bytes:
        words = [f"{done / 1e9:.2f} GB" if total is None else f"{done / 1e9:.2f} of {total / 1e9:.2f} GB"]
        words += [f"{rate / 1e6:,.0f} MB/s"] if done else []
    else:
        words = [f"{done:,}" if total is None else f"{done:,} of {total:,}"]
        words += [f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"] if done else []
    words += [clock.left(done=done, total=total)] if done and total else []
    return f"{description}: {', '.join(words)}"
