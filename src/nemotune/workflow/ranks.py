"""The stage `train` in each process of a run: alone, as one that nemotune started, or as one that somebody's torchrun started.

Rank 0 prepares, opens the run, prints and writes what is one; all train. A process that torchrun has started again resumes.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from nemotune.data.prepare import Prepared
from nemotune.distributed.world import World, start
from nemotune.engines import native
from nemotune.files import read_json, write_json
from nemotune.plan.parallel import check_parallel
from nemotune.recipe import Recipe
from nemotune.train import Deadline, TrainResult
from nemotune.workflow import training
from nemotune.workflow.processes import Process, end_with_parent, require_nproc, this_process
from nemotune.workflow.stopping import Stoppable

__all__ = ["train"]


def train(
    recipe: Recipe, *, run_dir: Path, resume: bool, overwrite: bool, dry_run: bool, console: Console, started: float | None = None
) -> None:
    """Train on the prepared rows, preparing them first where they are not there."""
    process = this_process()
    if process.world_size == 1 and process.launch_dir is None:
        training.train(recipe, run_dir=run_dir, resume=resume, overwrite=overwrite, dry_run=dry_run, console=console, started=started)
        return
    require_nproc(process, recipe.parallel.nproc)
    end_with_parent()
    with process.silent_unless_first():
        if process.launch_dir is not None:
            _train_launched(recipe, process, process.launch_dir, run_dir=run_dir, resume=resume)
        elif not dry_run:
            _train_among_others(recipe, process, run_dir=run_dir, resume=resume, overwrite=overwrite, console=console, started=started)
        elif process.is_first:
            training.train(recipe, run_dir=run_dir, resume=resume, overwrite=overwrite, dry_run=True, console=console, started=started)


def _train_launched(recipe: Recipe, process: Process, launch_dir: Path, *, run_dir: Path, resume: bool) -> None:
    """Train what the nemotune that started this process has prepared and opened, and let it know how that ended."""
    launch = read_json(launch_dir / "launch.json", remedy="start again")
    with start(check_parallel(recipe)) as world:
        resume = resume or _is_again(process, world)
        result = _engine(recipe, run_dir, resume=resume, deadline=Stoppable(launch["deadline"], run_dir), world=world)
    if process.is_first:
        write_json(launch_dir / "result.json", asdict(result))


def _train_among_others(
    recipe: Recipe, process: Process, *, run_dir: Path, resume: bool, overwrite: bool, console: Console, started: float | None
) -> None:
    """Rank 0 does the whole stage; the others wait until it is about to train, and train with it."""
    deadline = Stoppable.of_run(recipe, run_dir, started=started)
    with start(check_parallel(recipe)) as world:
        if _is_again(process, world):
            resume, overwrite = True, False

        def engine(*_: Any, **__: Any) -> TrainResult:
            world.barrier()
            return _engine(recipe, run_dir, resume=resume, deadline=deadline, world=world)

        if process.is_first:
            training.train(
                recipe,
                run_dir=run_dir,
                resume=resume,
                overwrite=overwrite,
                dry_run=False,
                console=console,
                deadline=deadline,
                engine=engine,
            )
        else:
            engine()


def _is_again(process: Process, world: World) -> bool:
    """Whether torchrun has started the processes again; where another machine lost one, this machine's torchrun counts no restart."""
    return world.any(process.restarts > 0)


def _engine(recipe: Recipe, run_dir: Path, *, resume: bool, deadline: Deadline, world: World) -> TrainResult:
    notes = Console(stderr=True, soft_wrap=True)
    prepared = Prepared.load(run_dir / "data")
    return native.train(recipe, prepared, run_dir=run_dir, resume=resume, console=notes, deadline=deadline, world=world)
