"""The time by which a run must have ended, and whether another step still fits before it.

What comes after the last step is reckoned as three checkpoints (writing one, reading the best one back, saving the outcome), by the
longest that was measured, and a margin for what was not; one that is being written beside the steps is a fourth. How a recipe names the time is in recipe/deadline.py.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nemotune.errors import AFTER_SIGNAL, RecipeError
from nemotune.recipe import Recipe
from nemotune.recipe.deadline import stop_time

RECENT_STEPS = 50  # the longest of these is what the next may take
CHECKPOINTS_AT_THE_END = 3
MARGIN_SECONDS, MARGIN_SHARE = 60.0, 0.05  # the smaller of the two, the share being of the whole time
BYTES_PER_SECOND = 200e6  # of a slow disk: for as long as no checkpoint was measured


class Deadline:
    """A point in time (`at`, seconds since 1970; None: there is none) and how long the parts of a run have taken, by `clock`."""

    def __init__(self, at: float | None = None, *, clock: Callable[[], float] = time.time):
        self.at, self.clock = at, clock
        self.margin = 0.0 if at is None else min(MARGIN_SECONDS, MARGIN_SHARE * (at - clock()))
        self.has_stopped = False  # whether it has ended a training
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._longest: dict[str, float] = {}
        self._begun: dict[str, float] = {}  # what goes on beside the steps

    @classmethod
    def of(cls, recipe: Recipe, *, started: float | None = None, clock: Callable[[], float] = time.time) -> Deadline:
        """That of a command that `started` then, or now. Raises RecipeError where it is past."""
        text = recipe.train.deadline
        at = None if text is None else stop_time(text, started=clock() if started is None else started)
        if at is not None and at <= clock():
            raise RecipeError(f"train.deadline: got {text}, which is past; name a later time, or a duration such as train.deadline=11h30m")
        return cls(at, clock=clock)

    @contextmanager
    def comes_with(self, number: signal.Signals) -> Iterator[None]:
        """While the block lasts, a signal to this process is the deadline: what is at hand is finished and saved, and the run ends."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python has handlers in the main thread alone
            return
        came: list[int] = []

        def come(number: int, _: object) -> None:
            came.append(number)
            self.come()

        before = signal.signal(number, come)
        try:
            yield
        except Exception as error:
            if came:
                error.add_note(AFTER_SIGNAL)
            raise
        finally:
            signal.signal(number, before)

    def come(self) -> None:
        """Be now, at the latest."""
        self.at = self.clock() if self.at is None else min(self.at, self.clock())

    @contextmanager
    def watch(self, part: str) -> Iterator[None]:
        """Measure a `step`, a `validation` or a `checkpoint`, which another thread may end."""
        self._begun[part] = started = self.clock()
        try:
            yield
            seconds = self.clock() - started
            if part == "step":
                self._steps.append(seconds)
            else:
                self._longest[part] = max(seconds, self._longest.get(part, 0.0))
        finally:
            del self._begun[part]

    def reckon(self, *, checkpoint_bytes: float, validation_steps: float) -> dict[str, float]:
        """Seconds that a step, the validation after it and the end of the run may take; what was not measured is estimated.

        `checkpoint_bytes` are those of one checkpoint, `validation_steps` the optimiser steps that see as many rows as a validation;
        0 if none is due.
        """
        step = max(self._steps, default=0.0)
        validation = self._longest.get("validation", validation_steps * step) if validation_steps else 0.0
        checkpoint, count = self._longest.get("checkpoint", checkpoint_bytes / BYTES_PER_SECOND), CHECKPOINTS_AT_THE_END
        if (begun := self._begun.get("checkpoint")) is not None:  # one is being written, and is waited for
            checkpoint, count = max(checkpoint, self.clock() - begun), count + 1
        return {"step_seconds": step, "validation_seconds": validation, "end_seconds": count * checkpoint + self.margin}

    def leaves_time(self, *, checkpoint_bytes: float, validation_steps: float) -> bool:
        """Whether another step fits, with what follows it. Once it says no, `has_come` says yes."""
        needed = sum(self.reckon(checkpoint_bytes=checkpoint_bytes, validation_steps=validation_steps).values())
        self.has_stopped = self.at is not None and self.seconds_left() < needed
        return not self.has_stopped

    def seconds_left(self) -> float:
        """Until the deadline, which there must be."""
        assert self.at is not None
        return self.at - self.clock()

    def has_come(self) -> bool:
        """Whether it ended the training, or is past."""
        return self.has_stopped or (self.at is not None and self.seconds_left() <= 0)
