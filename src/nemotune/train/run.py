"""The training loop, top to bottom: batches by step number, one step, health, metrics, validation, checkpoint.

LoRA, full tuning and pretraining share it: they differ in which parameters are trainable. A step's batches, rate and dropout are
functions of its number, so a resumed run continues the very trace of an uninterrupted one.
"""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from nemotune.data.loader import Loader
from nemotune.data.split import Split
from nemotune.errors import DataError, TrainingError
from nemotune.lora import DropoutKeys
from nemotune.models import CausalLM
from nemotune.recipe import Recipe
from nemotune.train.activation import set_activation_checkpointing
from nemotune.train.checkpoint import Checkpoints, Progress
from nemotune.train.deadline import Deadline
from nemotune.train.health import Liveness, SpikeGuard, require_finite
from nemotune.train.metrics import Metrics
from nemotune.train.optim import describe, make_optimizer
from nemotune.train.precision import audit_precision
from nemotune.train.progress import StepBar
from nemotune.train.schedule import learning_rate, part_of
from nemotune.train.step import accumulate, gradient_norm, update
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
) -> TrainResult:
    """Train the parameters of `model` that require gradients; leaves metrics and checkpoints in `run_dir`.

    With `resume`, goes on from the newest whole checkpoint. Before `deadline` it stops after a step like any other, with a checkpoint.
    Raises TrainingError for dead or non-finite gradients, divergence, and tensors that are not held as promised.
    """
    settings = recipe.train
    deadline = deadline or Deadline()
    loader = Loader(train, global_batch_size=settings.global_batch_size, micro_batch_size=settings.micro_batch_size, seed=settings.seed)
    total_steps = count_steps(loader.steps_per_epoch, recipe)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters, settings, plus_ratio=recipe.lora.plus_ratio)
    if said := describe(optimizer):
        console.print(said)
    set_activation_checkpointing(model, settings.activation_checkpointing)
    checkpoints = Checkpoints(run_dir, keep=settings.keep_checkpoints)
    progress = Progress()
    if resume and (newest := checkpoints.latest()):
        progress = checkpoints.load(newest, model, optimizer)
        console.print(f"resumed after step {progress.step} from {newest}", markup=False)
    console.print(audit_precision(model, optimizer, recipe), highlight=False, soft_wrap=True)

    model.train()
    metrics = Metrics(run_dir, recipe.logging.trackers, resume_step=progress.step)
    held_out = Validation(model, validation, recipe, metrics=metrics, last_step=total_steps)
    held_out.begin(step=progress.step, console=console)
    liveness, spikes = Liveness(model), SpikeGuard(progress.usual_losses, progress.spikes)

    def next_step_is() -> dict[str, float]:
        trained = sum(p.numel() for p in parameters.values())
        due = held_out.is_due(progress.step + 1)
        return {"checkpoint_bytes": 12.0 * trained, "validation_steps": held_out.steps if due else 0.0}  # fp32: weight, two moments

    def save(*, best: bool = False) -> None:
        metrics.sync()
        with deadline.watch("checkpoint"):
            checkpoints.save(model, optimizer, progress, best=best)

    stopped_early, loss = progress.has_waited(settings.early_stopping), math.nan
    with StepBar(console, total=total_steps, done=progress.step) as bar:
        while progress.step < total_steps and not stopped_early and deadline.leaves_time(**next_step_is()):
            started = time.perf_counter()
            with deadline.watch("step"):
                rate = learning_rate(progress.step, total_steps, settings)
                result = accumulate(model, loader.step(progress.step), keys=keys, seed=settings.seed, step=progress.step)
                loss, norm = result.loss, gradient_norm(parameters.values())
                require_finite(loss, norm, parameters, step=progress.step + 1)
                liveness.check()
                update(parameters.values(), optimizer, learning_rate=rate, grad_norm=norm, max_grad_norm=settings.max_grad_norm)
            warning = spikes.check(loss, step=progress.step + 1)
            progress = progress.after_step(result, usual_losses=spikes.usual, spikes=spikes.spikes)

            seconds, memory, is_last = time.perf_counter() - started, peak_memory_bytes(), progress.step == total_steps
            bar.advance(loss=loss, tokens_per_second=result.tokens / seconds, memory_bytes=memory)
            if warning:
                metrics.write("warning", progress.step, message=warning)
                console.print(f"[yellow]step {progress.step}: {warning}")
            if progress.step % recipe.logging.every == 0 or progress.step == 1 or is_last:
                metrics.write(
                    "train", progress.step, epoch=progress.step / loader.steps_per_epoch, loss=progress.loss_sum / progress.supervised_tokens,
                    learning_rate=rate, grad_norm=norm, tokens=progress.tokens, supervised_tokens=progress.supervised_tokens,
                    tokens_per_second=result.tokens / seconds, seconds=seconds, peak_memory_bytes=memory,
                )  # fmt: skip
                progress = progress.after_row()

            better = False
            if held_out.is_due(progress.step):
                with deadline.watch("validation"):
                    measured = held_out.measure(progress.step)
                bar.note(f"validation {measured:.4f}")
                better = measured < (math.inf if progress.best_loss is None else progress.best_loss)
                progress = progress.after_evaluation(measured, better=better)
                stopped_early = progress.has_waited(settings.early_stopping)
            if is_last or stopped_early:
                liveness.judge()
            due = settings.checkpoint_every and progress.step % settings.checkpoint_every == 0
            if due or better or is_last or stopped_early:
                save(best=better)
    if deadline.has_stopped:
        if progress.step == 0:
            raise TrainingError("train.deadline: no time is left for a first step; name a later time, then start again with --overwrite")
        if liveness.steps:
            liveness.judge()
        metrics.write("deadline", progress.step, seconds_left=deadline.seconds_left(), **deadline.reckon(**next_step_is()))
        if not checkpoints.has(progress.step):
            save()
    metrics.close()
    if unreached := liveness.unreached():
        console.print(f"experts that no gradient reached in the first steps: {sum(unreached.values())} in {len(unreached)} modules")
    if said := held_out.summary():
        console.print(said, highlight=False, soft_wrap=True)
    ended: Ended = "stopped at the deadline" if deadline.has_stopped else "stopped early" if stopped_early else "finished"
    return TrainResult(progress.step, loss, progress.best_loss, _keep_best(model, optimizer, checkpoints), ended)


def count_steps(steps_per_epoch: int, recipe: Recipe) -> int:
    """Optimiser steps of the whole run."""
    if steps_per_epoch == 0:
        raise DataError("data.train: no rows are left to train on; see the rejected rows in data/stats.json")
    steps = part_of(steps_per_epoch, recipe.train.epochs)
    return min(steps, recipe.train.max_steps or steps)


def peak_memory_bytes() -> int:
    """The most memory that the process held: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _keep_best(model: CausalLM, optimizer: torch.optim.Optimizer, checkpoints: Checkpoints) -> str:
    """Give the model the weights of the lowest validation loss; without a validation the last ones stay."""
    best = checkpoints.best()
    if best is None:
        return "last"
    checkpoints.load(best, model, optimizer)
    return "best"
