"""Starting the processes of a training: torchrun's agent in this process, `nemotune train` in each of the others.

What those do is in `ranks.py`. torchrun starts them again where one is lost; its own words are left out, those of the processes are not.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from nemotune.data.prepare import Prepared
from nemotune.errors import RecipeError
from nemotune.files import read_json, write_json
from nemotune.recipe import Recipe
from nemotune.train import Deadline, TrainResult
from nemotune.workflow.messages import say
from nemotune.workflow.processes import LAUNCH_DIR, USERS

MAX_RESTARTS = 3  # after a process is lost: each goes on from the last checkpoint
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # that torchrun hands on, and leaves handlers of


def train(recipe: Recipe, prepared: Prepared, *, run_dir: Path, resume: bool, console: Console, deadline: Deadline) -> TrainResult:
    """Train in `parallel.nproc` processes of this machine what is prepared and opened in `run_dir`. Leaves as they do, if they fail."""
    del prepared  # they read it from the run directory
    with tempfile.TemporaryDirectory(prefix="nemotune_") as folder:
        launch_dir = Path(folder)
        write_json(launch_dir / "launch.json", {"deadline": deadline.at})
        words = ["train", str(run_dir.absolute()), *["--resume"] * resume, *["--debug"] * ("--debug" in sys.argv)]
        outcome = launch_dir / "result.json"
        try:
            start(["-m", "nemotune", *words], nproc=recipe.parallel.nproc, launch_dir=launch_dir, console=console)
        except SystemExit as stop:
            if stop.code != 128 + signal.SIGTERM or not outcome.is_file():  # else they have saved what they had, and ended
                raise
        result = TrainResult(**read_json(outcome, remedy="no process said how the training ended; --debug shows all"))
    deadline.has_stopped = result.ended == "stopped at the deadline"
    return result


def require_gpus(nproc: int) -> None:
    """Raise RecipeError where this machine has GPUs, and fewer than the processes that are to start on it."""
    import torch

    have = torch.cuda.device_count()
    if torch.cuda.is_available() and nproc > have:
        raise RecipeError(
            f"parallel.nproc: got {nproc}, and this machine has {have} GPU{'s' * (have > 1)}; set parallel.nproc={have}, "
            "or have several machines work together: nemotune launch, or torchrun on each"
        )


def start(command: Sequence[str], *, nproc: int, launch_dir: Path, console: Console, max_restarts: int = MAX_RESTARTS) -> None:
    """Run `command` of Python in `nproc` processes until all have ended well, else exit as the first that failed.

    A signal to this process is handed on to them, and exits with 128 + its number.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = {"nproc-per-node": nproc, "max-restarts": max_restarts, "local-addr": "127.0.0.1", "log-dir": launch_dir / "torchrun"}
    words = [f"--{name}={value}" for name, value in options.items()]
    with _environment(launch_dir, nproc), _own_signals(), _no_logs():
        try:
            torchrun.main(["--standalone", *words, *command])
        except ChildFailedError as error:
            failed = error
        except SignalException as stop:
            raise SystemExit(128 + stop.sigval) from None
        else:
            return
    raise SystemExit(_exit_code(failed.failures, console))


def _exit_code(failures: dict[int, Any], console: Console) -> int:
    """Of the first that failed, or 2 where there is something to mend; says what it can of one that could say nothing itself."""
    first = min(failures.values(), key=lambda failure: failure.timestamp)
    if any(failure.exitcode == int(USERS) for failure in failures.values()):
        return int(USERS)
    if first.exitcode > 0:
        return int(first.exitcode)
    name = signal.Signals(-first.exitcode).name
    why = "; the system does that where memory has run out" if name == "SIGKILL" else ""
    say(console, f"A process (local rank {first.local_rank}) was ended by {name}{why}, after {MAX_RESTARTS} restarts.")
    say(console, "The same command with --resume goes on from the last checkpoint.")
    return 128 - int(first.exitcode)


@contextmanager
def _environment(launch_dir: Path, nproc: int) -> Iterator[None]:
    """What the processes find: where their outcome is waited for, and as many threads each as leave a core to all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    before = dict(os.environ)
    os.environ[LAUNCH_DIR] = str(launch_dir)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Put back the handlers that torchrun replaces."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _no_logs() -> Iterator[None]:
    """Without torchrun's own reports, which --debug shows."""
    if "--debug" not in sys.argv:
        logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
