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

import torch
from rich.console import Console

from nemotune.data.loader import Loader, batches
from nemotune.data.split import Split
from nemotune.errors import DataError
from nemotune.lora import DropoutKeys
from nemotune.models import CausalLM
from nemotune.recipe import Recipe
from nemotune.train.activation import set_activation_checkpointing
from nemotune.train.checkpoint import Checkpoints, Progress
from nemotune.train.health import Liveness, SpikeGuard, require_finite
from nemotune.train.metrics import Metrics
from nemotune.train.optim import describe, make_optimizer
from nemotune.train.progress import StepBar
from nemotune.train.schedule import learning_rate, part_of
from nemotune.train.step import accumulate, gradient_norm, update, validation_loss


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: steps taken in all, last training loss, lowest validation loss, and which weights the model now holds."""

    steps: int
    loss: float
    best_validation_loss: float | None
    weights: str  # "last" or "best"
    stopped_early: bool


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
) -> TrainResult:
    """Train the parameters of `model` that require gradients; leaves metrics and checkpoints in `run_dir`.

    With `resume`, goes on from the newest whole checkpoint. Raises TrainingError for dead or non-finite gradients and divergence.
    """
    settings = recipe.train
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

    model.train()
    metrics = Metrics(run_dir, recipe.logging.trackers, resume_step=progress.step)
    liveness, spikes = Liveness(model), SpikeGuard(progress.usual_losses, progress.spikes)
    stopped_early, loss = progress.has_waited(settings.early_stopping), math.nan
    with StepBar(console, total=total_steps, done=progress.step) as bar:
        while progress.step < total_steps and not stopped_early:
            started = time.perf_counter()
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
            if validation is not None and settings.eval_every and (progress.step % settings.eval_every == 0 or is_last):
                held_out = validation_loss(model, batches(validation, max_tokens=recipe.data.sequence_length * settings.micro_batch_size))
                metrics.write("eval", progress.step, loss=held_out, perplexity=math.exp(min(held_out, 700.0)))
                bar.note(f"validation {held_out:.4f}")
                better = held_out < (math.inf if progress.best_loss is None else progress.best_loss)
                progress = progress.after_evaluation(held_out, better=better)
                stopped_early = progress.has_waited(settings.early_stopping)
            if is_last or stopped_early:
                liveness.judge()
            due = settings.checkpoint_every and progress.step % settings.checkpoint_every == 0
            if due or better or is_last or stopped_early:
                metrics.sync()
                checkpoints.save(model, optimizer, progress, best=better)
    metrics.close()
    if unreached := liveness.unreached():
        console.print(f"experts that no gradient reached in the first steps: {sum(unreached.values())} in {len(unreached)} modules")
    return TrainResult(progress.step, loss, progress.best_loss, _keep_best(model, optimizer, checkpoints), stopped_early)


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
