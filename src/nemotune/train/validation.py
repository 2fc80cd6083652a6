"""The held-out rows of a run: when they are due, and what a pass over them says of the model: loss, and which experts it uses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console

from nemotune.data.loader import Batch, batches, filler
from nemotune.data.split import Split
from nemotune.distributed import World
from nemotune.distributed.pipeline import Stage
from nemotune.distributed.rows import row_of
from nemotune.distributed.world import ALONE, BATCHES
from nemotune.models import CausalLM
from nemotune.recipe import Recipe
from nemotune.train.experts import Counts, ExpertCounter, describe_load, load_row
from nemotune.train.metrics import Metrics
from nemotune.train.step import validation_loss


class Validation:
    """Passes over `split` every `train.eval_every` steps and after `last_step`, written to `metrics`; none without the two."""

    def __init__(self, model: CausalLM, split: Split | None, recipe: Recipe, *, metrics: Metrics, last_step: int, world: World = ALONE):
        self.model, self.split, self.metrics, self.last_step = model, split, metrics, last_step
        self.every = recipe.train.eval_every if split is not None else None
        self.max_tokens = recipe.data.sequence_length * recipe.train.micro_batch_size
        self.steps = 0.0 if split is None else len(split.packs) / recipe.train.global_batch_size  # that see as many rows
        self.experts, self.world = ExpertCounter(model), world
        self._loads: list[dict[str, Any]] = [row for row in metrics.rows() if row["kind"] == "experts"]  # the first is the base's

    def is_due(self, step: int) -> bool:
        """Whether a pass comes after `step`."""
        return self.every is not None and (step % self.every == 0 or step == self.last_step)

    def begin(self, *, step: int, console: Console) -> None:
        """Before the first step: which experts the base uses. A resumed run has it in its metrics."""
        if self.every is None or step or not self.model.config.expert_layers:
            return
        console.print("counting which experts the base uses on data.validation")
        was_training = self.model.training
        self.model.eval()
        rows = (row_of(batch, self.model.device, self.world) for batch in self._batches())
        with torch.no_grad(), self.experts.counting():
            Stage(self.model, self.world).evaluate(rows, lambda row, x: self.model(x, row.documents))
        self.model.train(was_training)
        self._write_load(0)

    def measure(self, step: int) -> float:
        """The loss over all held-out rows; it and the load of the experts are written."""
        with self.experts.counting():
            loss: float = self.world.agree(validation_loss(self.model, self._batches(), world=self.world))  # all decide by the same bits
        self.metrics.write("eval", step, loss=loss, perplexity=math.exp(min(loss, 700.0)))
        if self._loads:
            self._write_load(step)
        return loss

    def summary(self) -> str | None:
        """A line on the experts at the last validation, if there are any and there was one."""
        return describe_load(self._loads[-1]) if len(self._loads) > 1 else None

    def _batches(self) -> Iterator[Batch]:
        """This process's share."""
        assert self.split is not None
        hand, hands = self.world.index(*BATCHES), self.world.degree(*BATCHES)
        number = -1
        for number, batch in enumerate(batches(self.split, max_tokens=self.max_tokens)):
            if number % hands == hand:
                yield batch
        if hand > number % hands:
            with self.experts.paused():
                yield filler()

    def _write_load(self, step: int) -> None:
        counts = _together(self.world.gather(self.experts.counts() if self.world.index("tensor") == 0 else {}))
        base = {layer: load["counts"] for layer, load in self._loads[0]["layers"].items()} if self._loads else counts
        row = load_row(counts, base)
        self.metrics.write("experts", step, **row)
        self._loads.append({"step": step, **row})


def _together(of_processes: Sequence[Counts]) -> Counts:
    """The counts of all processes added up, layer by layer."""
    totals: Counts = {}
    for counts in of_processes:
        for layer, chosen in counts.items():
            totals[layer] = [a + b for a, b in zip(totals[layer], chosen, strict=True)] if layer in totals else chosen
    return {layer: totals[layer] for layer in sorted(totals, key=int)}
