"""The training loop on a random hybrid and toy rows; what it wrote, and a way to stop it in the middle."""

from __future__ import annotations

import itertools
from pathlib import Path

from rich.console import Console
from toy_split import ToySplit

from nemotune.lora import apply_lora
from nemotune.models import load_model
from nemotune.recipe import load
from nemotune.train import TrainResult, run
from nemotune.train.metrics import read_metrics

SPLIT, HELD_OUT = ToySplit([30, 12, 25, 9, 18, 21]), ToySplit([11, 16], seed=1)
SETTINGS = (
    "lora.rank=4", "lora.dropout=0.2", "train.epochs=99", "train.global_batch_size=2", "train.micro_batch_size=1", "train.learning_rate=1e-2",
    "train.warmup_steps=0", "train.schedule=constant", "train.checkpoint_every=null", "train.eval_every=null", "data.validation=0.1",
    "logging.every=1", "logging.trackers=[]",
)  # fmt: skip
TIMES = ("seconds", "tokens_per_second", "model_tflops", "peak_memory_bytes")


def train_toy(directory: Path, run_dir: Path, *settings: str, resume=False, doctor=lambda model: None, console=None, deadline=None):
    """Train a fresh adapter on the model in `directory`; `doctor` may change it first. Steps have two micro batches."""
    model = load_model(directory, dtype="float32")
    recipe = load("quickstart", (*SETTINGS, *settings))
    keys = apply_lora(model, recipe.lora)
    doctor(model)
    result: TrainResult = run(
        model, recipe, train=SPLIT, validation=HELD_OUT, run_dir=run_dir, keys=keys, resume=resume, console=console or Console(quiet=True),
        deadline=deadline,
    )  # fmt: skip
    return model, result


class Clock:
    """Seconds that a test lets pass."""

    def __init__(self, now: float = 0.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def interrupted_at(step: int):
    """Doctor a model so that optimiser step `step`, 1 being the first, is interrupted."""
    micro_batches = itertools.count()

    def before(module, inputs):
        if module.training and next(micro_batches) // 2 + 1 == step:
            raise KeyboardInterrupt

    return lambda model: model.register_forward_pre_hook(before)


def rows(run_dir: Path, kind: str | None = None) -> list[dict]:
    """The rows of metrics.jsonl without what a clock measured."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run_dir) if kind in (None, row["kind"])]
