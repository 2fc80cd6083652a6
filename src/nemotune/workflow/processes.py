"""Which of a run's processes this one is, as torchrun's environment says, and what of them fails first. The standard library alone.

How the processes of a run are started is in `launching.py`, what each of them does in `ranks.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemotune.errors import RecipeError, UnsupportedError

LAUNCH_DIR = "NEMOTUNE_LAUNCH_DIR"  # where the nemotune that started torchrun itself waits for the outcome
NOTE = "nemotune_failed"
CAUSE_SECONDS = 3.0  # by which a process that ended the others' connections has said why, or torchrun has ended the others as well
USERS = "2"  # the exit code of what a user has to mend
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Process:
    """One of `world_size` processes; `restarts` counts how often torchrun has started them again. Alone where there is no torchrun."""

    rank: int = 0
    world_size: int = 1
    restarts: int = 0
    launch_dir: Path | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    @contextlib.contextmanager
    def silent_unless_first(self) -> Iterator[None]:
        """Let rank 0 alone print while the block lasts. An error is told by `first_to_fail`, whichever process that is."""
        if self.is_first or "--debug" in sys.argv:
            yield
            return
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def this_process() -> Process:
    """What torchrun's environment says of this process."""
    found = os.environ
    if "RANK" not in found or "WORLD_SIZE" not in found:
        return Process()
    launch_dir = Path(found[LAUNCH_DIR]) if LAUNCH_DIR in found else None
    return Process(int(found["RANK"]), int(found["WORLD_SIZE"]), int(found.get("TORCHELASTIC_RESTART_COUNT", 0)), launch_dir)


def require_alone(verb: str) -> None:
    """Raise UnsupportedError where torchrun started several processes with a verb that is for one."""
    if (size := this_process().world_size) > 1:
        starts = "parallel.nproc=N starts the processes of its training by itself" if verb == "run" else "it works in one process"
        raise UnsupportedError(
            f"nemotune {verb}: got {size} processes from torchrun, expected one; type `nemotune {verb}` without it ({starts}). "
            "With torchrun: nemotune train"
        )


def require_nproc(process: Process, nproc: int) -> None:
    """Raise RecipeError where torchrun started another number of processes than the recipe's."""
    if process.world_size != nproc:
        raise RecipeError(
            f"parallel.nproc: got {nproc}, and torchrun started {process.world_size} processes (WORLD_SIZE); "
            f"set parallel.nproc={process.world_size}, or start {nproc}"
        )


def end_with_parent() -> None:
    """Have Linux end this process when torchrun is gone: nobody else would, and the run's directory would be free for another."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def are_several() -> bool:
    """Whether torchrun started this process, maybe with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def first_to_fail(code: str) -> bool:
    """Whether this process is the first of torchrun's attempt to fail on this node, and so the one to say why; alone it always is."""
    attempt = _attempt_dir()
    if attempt is None:
        return True
    try:
        with (attempt / NOTE).open("x", encoding="utf-8") as note:
            note.write(code)
    except FileExistsError:
        return False
    return True


def first_to_fail_after_the_cause() -> bool:
    """`first_to_fail` for an error that another process may have caused, by ending."""
    attempt, end = _attempt_dir(), time.monotonic() + CAUSE_SECONDS
    while attempt and time.monotonic() < end and not (attempt / NOTE).exists():
        time.sleep(0.05)
    return first_to_fail("1")


def has_failed_for_good() -> bool:
    """Whether an earlier attempt of this torchrun ended with what its user has to mend, so that another would end alike."""
    attempt = _attempt_dir()
    return attempt is not None and any(note.read_text(encoding="utf-8") == USERS for note in attempt.parent.glob(f"attempt_*/{NOTE}"))


def _attempt_dir() -> Path | None:
    """The directory of its own that torchrun gives each attempt on a node: it holds LOCAL_RANK/error.json."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    attempt = Path(error_file).parents[1] if error_file else None
    return attempt if attempt and attempt.name.startswith("attempt_") and attempt.is_dir() else None
