"""An export's plan carried out where a user watches: a bar while it is written, then the time that reading it back takes. What is written is the plan's."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from nemotune.data.progress import Clock, progress, waiting
from nemotune.export.stream import Plan, write

Report = TypeVar("Report")


def written(plan: Plan[Report], target: Path, *, overwrite: bool) -> Report:
    """What reading it back found. Raises what `write` does."""
    clock = Clock()
    with ExitStack() as shown:
        advance = shown.enter_context(progress(f"writing {target.name}", total=plan.num_bytes, in_bytes=True))

        def verify(staged: Path) -> Report:
            shown.close()
            shown.enter_context(waiting(f"reading {target.name} back", clock))
            return plan.verify(staged)

        return write(replace(plan, verify=verify), target, overwrite=overwrite, done=advance)
