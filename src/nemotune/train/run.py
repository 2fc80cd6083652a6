"""A training run, top to bottom: what it works with, an audit, its turns (`loop.py`) and how it ended.

LoRA, full tuning and pretraining share it: they differ in which parameters are trainable. A step's batches, rate and dropout are
functions of its number, so a resumed run continues the very trace of an uninterrupted one.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from torch.optim import Optimizer

from nemotune.data.loader import Loader
from nemotune.data.split import Split
from nemotune.distributed import Gradients, World, layouts_of, replicas
from nemotune.distributed.stages import describe_stages
from nemotune.distributed.world import ALONE, BATCHES, TOKENS
from nemotune.errors import DataError
from nemotune.lora import DropoutKeys
from nemotune.models import CausalLM
from nemotune.ops.kernels import kernels
from nemotune.recipe import Recipe
from nemotune.train.activation import set_activation_checkpointing
from nemotune.train.balance import Balance
from nemotune.train.checkpoint import Checkpoints, Progress
from nemotune.train.deadline import Deadline
from nemotune.train.loop import Loop
from nemotune.train.metrics import Metrics
from nemotune.train.optim import describe, make_optimizer
from nemotune.train.precision import audit_precision
from nemotune.train.progress import StepBar
from nemotune.train.schedule import part_of
from nemotune.train.validation import Validation

Ended = Literal["finished", "stopped early", "stopped at the deadline"]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: steps taken in all, last training loss, lowest validation loss, and which weights the model now holds."""

    steps: int
    loss: float
    best_validation_loss: float | None
    weights: str  # "last" or "best"
    ended: Ended


def run(
    model: CausalLM,
    recipe: Recipe,
    *,
    train: Split,
    validation: Split | None,
    run_dir: Path,
    keys: DropoutKeys | None,
    resume: bool,
    console: Console,
    deadline: Deadline | None = None,
    world: World = ALONE,
) -> TrainResult:
    """Train the parameters of `model` that require gradients; leaves metrics and checkpoints in `run_dir`.

    Each process of `world` calls it with what it holds of the model; the first one writes. With `resume`, goes on from the newest whole
    checkpoint. Before `deadline`, or on SIGTERM to any process, all stop after a step like any other, with a checkpoint.
    Raises TrainingError for dead or non-finite gradients, divergence, and tensors that are not held as promised.
    """
    settings = recipe.train
    deadline = deadline or Deadline()
    loader = Loader(
        train, global_batch_size=settings.global_batch_size, micro_batch_size=settings.micro_batch_size, seed=settings.seed,
        hand=(world.index(*BATCHES), world.degree(*BATCHES)),
    )  # fmt: skip
    total_steps = count_steps(loader.steps_per_epoch, recipe)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layouts = layouts_of(model)
    gradients = Gradients(parameters, layouts, replicas=replicas(model), world=world)
    optimizer = make_optimizer(parameters, settings, plus_ratio=recipe.lora.plus_ratio)
    if said := describe(optimizer):
        console.print(said)
    set_activation_checkpointing(model, settings.activation_checkpointing)
    checkpoints = Checkpoints(run_dir, keep=settings.keep_checkpoints, layouts=layouts, world=world, say=console.print)
    progress = _resume(model, optimizer, checkpoints, console=console) if resume else Progress()
    if world.degrees.pipeline > 1:
        console.print(describe_stages(model.config, world.degrees.pipeline), highlight=False, soft_wrap=True)
    console.print(audit_precision(model, optimizer, recipe), highlight=False, soft_wrap=True)
    console.print(str(kernels(model.device, model.compute_dtype, model.config.head_dim)), highlight=False, soft_wrap=True, markup=False)

    model.train()
    metrics = Metrics(run_dir, recipe.logging.trackers, resume_step=progress.step, silent=not world.is_first)
    held_out = Validation(model, validation, recipe, metrics=metrics, last_step=total_steps, world=world)
    held_out.begin(step=progress.step, console=console)
    balance = Balance.of(model, settings, total=lambda summed: world.sum(summed, "pipeline", *TOKENS))
    loop = Loop(
        model, recipe, loader=loader, total_steps=total_steps, parameters=parameters, optimizer=optimizer, checkpoints=checkpoints,
        progress=progress, metrics=metrics, held_out=held_out, deadline=deadline, keys=keys, balance=balance, gradients=gradients,
        world=world, console=console,
    )  # fmt: skip
    with checkpoints, deadline.comes_with(signal.SIGTERM), StepBar(console, total=total_steps, done=progress.step) as bar:
        while loop.goes_on():
            step = loop.take_step()
            loop.record(step, bar)
            better = loop.validate(bar)
            loop.keep(better=better)
    if deadline.has_stopped:
        loop.stop_at_deadline()
    metrics.close()
    loop.say_what_was_seen()
    ended: Ended = "stopped at the deadline" if deadline.has_stopped else "stopped early" if loop.has_stopped_early else "finished"
    reached = loop.progress
    return TrainResult(reached.step, loop.loss, reached.best_loss, _keep_best(model, optimizer, checkpoints, reached), ended)


def count_steps(steps_per_epoch: int, recipe: Recipe) -> int:
    """Optimiser steps of the whole run."""
    if steps_per_epoch == 0:
        raise DataError("data.train: no rows are left to train on; see the rejected rows in data/stats.json")
    steps = part_of(steps_per_epoch, recipe.train.epochs)
    return min(steps, recipe.train.max_steps or steps)


def _resume(model: CausalLM, optimizer: Optimizer, checkpoints: Checkpoints, *, console: Console) -> Progress:
    """Restore the newest whole checkpoint; where it knows of a best one that is not there, the best counts anew."""
    newest = checkpoints.latest(warn=lambda text: console.print(f"[yellow]{escape(text)}", soft_wrap=True))
    if newest is None:
        return Progress()
    progress = checkpoints.load(newest, model, optimizer)
    console.print(f"resumed after step {progress.step} from {newest}", markup=False)
    if progress.best_loss is not None and checkpoints.best(progress) is None:
        console.print(f"no checkpoint is left of the lowest validation loss so far, {progress.best_loss:.4f}: it counts anew from here")
        return progress.without_best()
    return progress


def _keep_best(model: CausalLM, optimizer: Optimizer, checkpoints: Checkpoints, progress: Progress) -> str:
    """Give the model the weights of the lowest validation loss; without a validation the last ones stay."""
    best = checkpoints.best(progress)
    if best is None:
        return "last"
    checkpoints.load(best, model, optimizer)
    return "best"
