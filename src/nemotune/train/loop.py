"""The turns of a run, part by part: a step, what is told of it, a validation, a checkpoint; and its end. `run.py` calls them in order."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer

from nemotune.data.loader import Loader
from nemotune.distributed import Gradients, World
from nemotune.errors import TrainingError
from nemotune.lora import DropoutKeys
from nemotune.models import CausalLM
from nemotune.recipe import Recipe
from nemotune.recipe.degrees import AXES
from nemotune.train.balance import Balance
from nemotune.train.checkpoint import Checkpoints, Progress
from nemotune.train.deadline import Deadline
from nemotune.train.flops import Flops, peak_tflops
from nemotune.train.health import Liveness, SpikeGuard, require_finite, unreached_experts
from nemotune.train.memory import give_back_freed, peak_memory_bytes
from nemotune.train.metrics import Metrics
from nemotune.train.progress import StepBar
from nemotune.train.schedule import learning_rate
from nemotune.train.step import StepResult, accumulate, update
from nemotune.train.validation import Validation


@dataclass(frozen=True)
class Step:
    """What one step gave, and what it took; a warning where its loss spiked."""

    result: StepResult
    learning_rate: float
    grad_norm: float
    warning: str | None
    seconds: float
    memory: int
    flops: float  # of this process
    balance: dict[str, Tensor]

    @property
    def tokens_per_second(self) -> float:
        return self.result.tokens / self.seconds


@dataclass
class Loop:
    """What a run works with, and where it stands."""

    model: CausalLM
    recipe: Recipe
    loader: Loader
    total_steps: int
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    checkpoints: Checkpoints
    progress: Progress
    metrics: Metrics
    held_out: Validation
    deadline: Deadline
    keys: DropoutKeys | None
    balance: Balance | None
    gradients: Gradients
    world: World
    console: Console
    loss: float = math.nan

    def __post_init__(self) -> None:
        self.flops, self.peak_tflops = Flops.of(self.model), peak_tflops(self.model.device, self.model.compute_dtype)
        self.liveness = Liveness(self.model)
        self.spikes = SpikeGuard(self.progress.usual_losses, self.progress.spikes)

    @property
    def is_at_last(self) -> bool:
        return self.progress.step == self.total_steps

    @property
    def has_stopped_early(self) -> bool:
        return self.progress.has_waited(self.recipe.train.early_stopping)

    def goes_on(self) -> bool:
        """Whether there is another step, and every process has time for it. Raises what went wrong with the last checkpoint."""
        self.checkpoints.check()
        if self.is_at_last or self.has_stopped_early:
            return False
        self.deadline.has_stopped = self.world.any(not self.deadline.leaves_time(**self._next_step()))
        if self.deadline.has_stopped and self.deadline.at is None:
            self.deadline.come()  # by a signal to another process
        return not self.deadline.has_stopped

    def take_step(self) -> Step:
        """Forward, backward, checks and update. Raises TrainingError before anything is updated with what is dead or not finite."""
        settings = self.recipe.train
        before, started = self.progress.step, time.perf_counter()
        with self.deadline.watch("step"):
            if self.model.device.type == "cpu":
                give_back_freed(before)
            rate = learning_rate(before, self.total_steps, settings)
            batches = self.loader.step(before)
            result = accumulate(
                self.model, batches, keys=self.keys, seed=settings.seed, step=before, balance=self.balance, world=self.world
            )
            self.gradients.reduce()
            self.loss, norm = result.loss, self.gradients.norm()
            require_finite(self.loss, norm, self.parameters, step=before + 1)
            self.liveness.check()
            update(self.parameters.values(), self.optimizer, learning_rate=rate, grad_norm=norm, max_grad_norm=settings.max_grad_norm)
            loads = self.balance.step() if self.balance else {}
        warning = self.spikes.check(self.loss, step=before + 1)
        self.progress = self.progress.after_step(result, usual_losses=self.spikes.usual, spikes=self.spikes.spikes)
        seconds = time.perf_counter() - started
        flops = self.flops.of_batches(batches) / self.world.degrees.context  # what is held of the model computes pieces of rows
        return Step(result, rate, norm, warning, seconds=seconds, memory=peak_memory_bytes(), flops=flops, balance=loads)

    def record(self, step: Step, bar: StepBar) -> None:
        """Tell the bar of the step, and every so many steps metrics.jsonl of those since the row before."""
        now = self.progress
        bar.advance(loss=self.loss, tokens_per_second=step.tokens_per_second, memory_bytes=step.memory)
        if step.warning:
            self.metrics.write("warning", now.step, message=step.warning)
            self.console.print(f"[yellow]step {now.step}: {step.warning}")
        if now.step % self.recipe.logging.every == 0 or now.step == 1 or self.is_at_last:
            model_tflops = self._mean(step.flops) / step.seconds / 1e12
            mfu = {"mfu": model_tflops / self.peak_tflops} if self.peak_tflops else {}
            self.metrics.write(
                "train", now.step, epoch=now.step / self.loader.steps_per_epoch, loss=now.loss_sum / now.supervised_tokens,
                learning_rate=step.learning_rate, grad_norm=step.grad_norm, tokens=now.tokens, supervised_tokens=now.supervised_tokens,
                tokens_per_second=step.tokens_per_second, seconds=step.seconds, peak_memory_bytes=step.memory,
                model_tflops=model_tflops, **mfu, **{name: value.item() for name, value in step.balance.items()},
            )  # fmt: skip
            self.progress = now.after_row()

    def validate(self, bar: StepBar) -> bool:
        """Measure the loss on held-out rows where that is due. Returns whether it is the lowest so far."""
        if not self.held_out.is_due(self.progress.step):
            return False
        with self.deadline.watch("validation"):
            measured = self.held_out.measure(self.progress.step)
        bar.note(f"validation {measured:.4f} (step {self.progress.step})")
        better = measured < (math.inf if self.progress.best_loss is None else self.progress.best_loss)
        self.progress = self.progress.after_evaluation(measured, better=better)
        return better

    def keep(self, *, better: bool) -> None:
        """Save where a checkpoint is due, the loss is `better`, or the run ends; a run that ends judges its adapters first."""
        ends = self.is_at_last or self.has_stopped_early
        if ends:
            self.liveness.judge()
        every = self.recipe.train.checkpoint_every
        if better or ends or (every and self.progress.step % every == 0):
            self._save()

    def stop_at_deadline(self) -> None:
        """Judge, record and save what the deadline ended. Raises TrainingError where it left no time for a first step."""
        step = self.progress.step
        if step == 0:
            raise TrainingError(
                "train.deadline: no time is left for a first step (or SIGTERM or a file `stop` came before it); name a later time, "
                "then start again with --overwrite"
            )
        if self.liveness.steps:
            self.liveness.judge()
        self.metrics.write("deadline", step, seconds_left=self.deadline.seconds_left(), **self.deadline.reckon(**self._next_step()))
        if not self.checkpoints.has(step):
            self._save()

    def say_what_was_seen(self) -> None:
        """Experts that nothing reached, and what validation has to say."""
        if unreached := unreached_experts(self.world.gather(self.liveness.reached())):
            self.console.print(
                f"experts that no gradient reached in the first steps: {sum(unreached.values())} in {len(unreached)} modules"
            )
        if said := self.held_out.summary():
            self.console.print(said, highlight=False, soft_wrap=True)

    def _mean(self, own: float) -> float:
        """Over the processes."""
        return self.world.sum(torch.tensor(own, dtype=torch.float64).to(self.world.device), *AXES).item() / self.world.size

    def _next_step(self) -> dict[str, float]:
        """What the deadline reckons with."""
        trained = sum(p.numel() for p in self.parameters.values())
        due = self.held_out.is_due(self.progress.step + 1)
        return {"checkpoint_bytes": 12.0 * trained, "validation_steps": self.held_out.steps if due else 0.0}  # fp32: weight, two moments

    def _save(self) -> None:
        self.metrics.sync()
        self.checkpoints.save(self.model, self.optimizer, self.progress, during=self.deadline.watch("checkpoint"))
