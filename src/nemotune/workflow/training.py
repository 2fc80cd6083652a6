"""The stages `plan` and `train`: what a recipe trains and holds, and the training of it, here or in processes that are started for it.

The loop itself is in `nemotune.train`; what each of several processes does is in `ranks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shlex import quote

from rich.console import Console

from nemotune.data.prepare import Prepared, prepare
from nemotune.data.sources import require_sources
from nemotune.distributed.stages import describe_stages
from nemotune.engines import native
from nemotune.errors import ConflictError
from nemotune.models import load_tokenizer, locate, read_config
from nemotune.plan.cost import cost_line, coverage_table, estimate, flops_line
from nemotune.plan.parallel import check_parallel
from nemotune.recipe import Recipe
from nemotune.train import Deadline, TrainResult
from nemotune.train.checkpoint import Checkpoints
from nemotune.workflow import launching
from nemotune.workflow.messages import say, wrote
from nemotune.workflow.run_dir import FROM_TRAINED, discard, held, open_run, refuse_begun
from nemotune.workflow.stopping import STOP, Stoppable

Engine = Callable[..., TrainResult]  # `native.train`, or what calls it elsewhere


def plan(recipe: Recipe, *, console: Console) -> None:
    """What the recipe trains, what it holds in memory, how much a token is to compute, and which layers go where."""
    degrees = check_parallel(recipe)
    cost = estimate(recipe)
    if recipe.method == "lora":
        console.print(coverage_table(cost.coverage))
    console.print(cost_line(cost))
    console.print(flops_line(cost), highlight=False)
    if degrees.pipeline > 1:
        config = read_config(locate(recipe.model.path, recipe.model.revision, weights=False))
        console.print(describe_stages(config, degrees.pipeline), highlight=False)


def require_fit(recipe: Recipe, *, here: bool = True) -> None:
    """Tell before any row is read what does not fit this machine (all processes being `here`), the model or the number of processes."""
    native.require_device(recipe)
    if here:
        launching.require_gpus(recipe.parallel.nproc)
    check_parallel(recipe)
    estimate(recipe)


def train(
    recipe: Recipe, *, run_dir: Path, resume: bool, overwrite: bool, dry_run: bool, console: Console, started: float | None = None,
    deadline: Deadline | None = None, engine: Engine | None = None,
) -> None:  # fmt: skip
    """Train on the prepared rows, preparing them first where they are not there."""
    refuse_begun(run_dir, resume=resume, overwrite=overwrite)
    if dry_run:
        require_sources(recipe)
        plan(recipe, console=console)
        say(console, f"would write {run_dir / native.trained_name(recipe)}")
        return
    deadline = deadline or Stoppable.of_run(recipe, run_dir, started=started)
    require_fit(recipe, here=engine is None)
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
    prepared = prepare(recipe, tokenizer, out_dir=run_dir / "data", overwrite=overwrite)
    train_prepared(recipe, prepared, run_dir, resume=resume, overwrite=overwrite, deadline=deadline, console=console, engine=engine)


def train_prepared(
    recipe: Recipe, prepared: Prepared, run_dir: Path, *, resume: bool, overwrite: bool, deadline: Deadline, console: Console,
    alone: bool = True, engine: Engine | None = None,
) -> None:  # fmt: skip
    """Train and keep the outcome; what an earlier outcome was evaluated, merged and reported as is removed.

    `engine` trains: where none is named our own does, in this process or in the several that the recipe asks for.
    """
    engine = engine or (native.train if recipe.parallel.nproc == 1 else launching.train)
    notes = Console(stderr=True, soft_wrap=True)
    with held(run_dir):
        refuse_begun(run_dir, resume=resume, overwrite=overwrite)  # again: another process may have been faster
        if resume and not Checkpoints(run_dir, keep=1).latest():
            if (trained := run_dir / native.trained_name(recipe)).is_dir():
                raise ConflictError(f"{trained}: no checkpoint is left to go on from; --overwrite trains anew, name=... keeps both")
            say(notes, f"no checkpoint in {run_dir} to resume from: begins with step 1")
        (run_dir / STOP).unlink(missing_ok=True)  # it was for the training before
        open_run(recipe, run_dir, fingerprint=prepared.fingerprint, resume=resume, overwrite=overwrite)
        result = engine(recipe, prepared, run_dir=run_dir, resume=resume, console=notes, deadline=deadline)
        discard(run_dir, FROM_TRAINED)
    place, is_cut = quote(str(run_dir)), result.ended == "stopped at the deadline"
    goes_on = "; `--resume` goes on" if is_cut else ""
    console.print(f"{result.ended} after {result.steps} steps; the {result.weights} weights are kept{goes_on}")
    after = f"nemotune {'eval' if recipe.evaluate.tasks else 'report'} {place}"
    then = f"nemotune run {place} --resume" if is_cut else after if alone else None
    wrote(console, run_dir / native.trained_name(recipe), then=then)
