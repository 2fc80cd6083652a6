"""When a training is to stop: at its deadline, or when a file called `stop` is in its run directory. How it stops is in `nemotune.train`.

A file reaches every process of a training on every machine, and needs no process to be found; `touch runs/NAME/stop` is all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from nemotune.recipe import Recipe
from nemotune.train import Deadline

STOP = "stop"


class Stoppable(Deadline):
    """A deadline, by `at` or none, that comes as soon as somebody leaves the file in `run_dir`."""

    def __init__(self, at: float | None, run_dir: Path, *, clock: Callable[[], float] = time.time):
        super().__init__(at, clock=clock)
        self.file = run_dir / STOP

    @classmethod
    def of_run(cls, recipe: Recipe, run_dir: Path, *, started: float | None = None) -> Stoppable:
        """That of a command that `started` then, or now. Raises RecipeError where it is past."""
        plain = Deadline.of(recipe, started=started)
        return cls(plain.at, run_dir, clock=plain.clock)

    def leaves_time(self, *, checkpoint_bytes: float, validation_steps: float) -> bool:
        if self.file.exists():
            self.come()
        return super().leaves_time(checkpoint_bytes=checkpoint_bytes, validation_steps=validation_steps)

    def seconds_left(self) -> float:
        """None, where another process saw the file and this one did not."""
        return 0.0 if self.at is None else super().seconds_left()
