"""The loop as a whole, on toy rows: what it writes, what stops it, what it keeps, and that an interruption changes none of it."""

from __future__ import annotations

import io
import itertools
import math
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from random_models import make
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import FileSystemReader
from toy_split import ToySplit

from nemotune.errors import TrainingError
from nemotune.lora import apply_lora, lora_modules
from nemotune.models import load_model
from nemotune.recipe import load
from nemotune.train import health, run
from nemotune.train.metrics import read_metrics

SPLIT, HELD_OUT = ToySplit([30, 12, 25, 9, 18, 21]), ToySplit([11, 16], seed=1)
SETTINGS = (
    "lora.rank=4", "lora.dropout=0.2", "train.epochs=99", "train.global_batch_size=2", "train.micro_batch_size=1", "train.learning_rate=1e-2",
    "train.warmup_steps=0", "train.checkpoint_every=null", "train.eval_every=null", "data.validation=0.1", "logging.every=1", "logging.trackers=[]",
)  # fmt: skip
TIMES = ("seconds", "tokens_per_second", "peak_memory_bytes")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "hybrid"
    make("hybrid").save_pretrained(path)
    return path


@pytest.fixture
def train(directory, tmp_path):
    """Train a fresh model in `tmp_path/<name>`; `doctor` may change the adapted model first. Returns the model and the result."""

    def train(*settings, name="run", resume=False, doctor=lambda model: None, console=Console(quiet=True)):  # noqa: B008
        model = load_model(directory, dtype="float32")
        recipe = load("quickstart", (*SETTINGS, *settings))
        keys = apply_lora(model, recipe.lora)
        doctor(model)
        return model, run(
            model, recipe, train=SPLIT, validation=HELD_OUT, run_dir=tmp_path / name, keys=keys, resume=resume, console=console
        )

    return train


def rows(run_dir, kind=None):
    """The rows without what a clock measured."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run_dir) if kind in (None, row["kind"])]


def adapters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def saved(checkpoint: Path):
    """The adapter tensors that a checkpoint holds."""
    state = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    wanted = {name: torch.empty(entry.size) for name, entry in state.items() if name.startswith("model.")}
    with warnings.catch_warnings(action="ignore"):
        torch.distributed.checkpoint.load(wanted, checkpoint_id=str(checkpoint), no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in wanted.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def louder_from(step):
    """Doctor a model so that from optimiser step `step` (1 is the first) its logits are wild: the loss jumps and stays high."""

    micro_batches = itertools.count()

    def after_head(module, inputs, output):
        return output * 300 if next(micro_batches) // 2 + 1 >= step else output

    return lambda model: model.lm_head.register_forward_hook(after_head)


def interrupted_at(step):
    """Doctor a model so that optimiser step `step` is interrupted."""
    micro_batches = itertools.count()

    def before(module, inputs):
        if module.training and next(micro_batches) // 2 + 1 == step:
            raise KeyboardInterrupt

    return lambda model: model.register_forward_pre_hook(before)


# metrics


def test_a_row_holds_the_token_mean_since_the_last(train, tmp_path):
    train("train.max_steps=8", name="each")
    train("train.max_steps=8", "logging.every=3", name="third")
    each, third = rows(tmp_path / "each"), rows(tmp_path / "third")
    assert [row["step"] for row in third] == [1, 3, 6, 8]
    assert len({row["supervised_tokens"] for row in each}) > 1, "steps of different weight"
    for before, row in zip([0, 1, 3, 6], third, strict=True):
        steps = each[before : row["step"]]
        tokens = sum(step["supervised_tokens"] for step in steps)
        assert row["supervised_tokens"] == tokens
        assert row["loss"] == pytest.approx(sum(step["loss"] * step["supervised_tokens"] for step in steps) / tokens, rel=1e-12)
        assert {k: row[k] for k in ("tokens", "grad_norm", "epoch")} == {k: steps[-1][k] for k in ("tokens", "grad_norm", "epoch")}


def test_resuming_between_two_rows_gives_the_same_rows(train, tmp_path):
    settings = "logging.every=4", "train.schedule=constant", "train.checkpoint_every=2"
    train(*settings, "train.max_steps=8", name="whole")
    with pytest.raises(KeyboardInterrupt):
        train(*settings, "train.max_steps=8", name="cut", doctor=interrupted_at(7))
    assert [row["step"] for row in rows(tmp_path / "cut")] == [1, 4]
    train(*settings, "train.max_steps=8", name="cut", resume=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_rows_are_on_disk_before_the_checkpoint_that_counts_on_them(train, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def watched(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path.name, path.read_text().count("\n") if path.name == "metrics.jsonl" else None))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    train("train.max_steps=4", "train.checkpoint_every=2")
    order = [entry for entry in synced if entry[0] in ("metrics.jsonl", ".metadata")]
    assert order == [("metrics.jsonl", 2), (".metadata", None), ("metrics.jsonl", 4), (".metadata", None)]


def test_tensorboard_has_the_numbers_of_the_rows_also_after_resuming(train, tmp_path):
    settings = "logging.trackers=[tensorboard]", "train.checkpoint_every=2", "train.eval_every=2", "train.schedule=constant"
    with pytest.raises(KeyboardInterrupt):
        train(*settings, "train.max_steps=5", doctor=interrupted_at(4))
    train(*settings, "train.max_steps=5", resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for kind, key in (("train", "loss"), ("train", "grad_norm"), ("eval", "perplexity")):
        told = [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows(tmp_path / "run", kind)]
        assert [(event.step, event.value) for event in events.Scalars(f"{kind}/{key}")] == told


def test_the_run_says_which_8_bit_optimiser_it_found(train, monkeypatch):
    monkeypatch.setattr(sys.modules[run.__module__], "describe", lambda optimizer: f"one of {type(optimizer).__name__}'s kind")
    told = io.StringIO()
    train("train.max_steps=1", console=Console(file=told))
    assert "one of AdamW's kind" in told.getvalue()


# what stops a run


def bypass_out_proj(model):
    layer = model.backbone.layers[0].mixer
    frozen = layer.out_proj.base
    layer.out_proj.forward = lambda x: torch.nn.functional.linear(x, frozen.weight)


def bypass_experts(model):
    """The forward finds the frozen layers where the adapted ones are, as a kernel does that takes the weights."""
    experts = model.backbone.layers[1].mixer.experts
    frozen = SimpleNamespace(up_proj=experts.up_proj.base, down_proj=experts.down_proj.base, dispatch=experts.dispatch)
    experts.forward = partial(type(experts).forward, frozen)


def test_a_dead_adapter_stops_the_loop_at_the_first_step(train, tmp_path):
    with pytest.raises(TrainingError, match=r"out_proj\.lora_B"):
        train("train.max_steps=3", "lora.targets=[mamba]", "train.checkpoint_every=1", doctor=bypass_out_proj)
    assert not rows(tmp_path / "run") and not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("ending", [("train.max_steps=3",), ("train.max_steps=99", "train.eval_every=1", "train.early_stopping=1")])
def test_experts_are_judged_at_the_end_of_a_run_shorter_than_the_watch(train, tmp_path, ending):
    with pytest.raises(TrainingError, match=r"up_proj: no gradient reached this module in \d steps \(2 in all\)"):
        train(*ending, "train.learning_rate=3", doctor=bypass_experts)
    assert rows(tmp_path / "run")[-1]["step"] < health.EXPERT_STEPS


def test_a_gradient_that_is_not_finite_stops_the_loop_before_the_update(train, tmp_path):
    first = []

    def doctor(model):
        first.append(adapters(model))
        victim = next(layer for _, layer in lora_modules(model))
        victim.lora_A.register_hook(lambda gradient: gradient * math.nan)
        first.append(model)

    with pytest.raises(TrainingError, match=r"step 1: .*lora_A"):
        train("train.max_steps=3", doctor=doctor)
    assert same(first[0], adapters(first[1])) and not rows(tmp_path / "run")


def test_divergence_is_written_and_stops_the_loop_at_the_same_step_when_resumed(train, tmp_path, monkeypatch):
    monkeypatch.setattr(health, "SPIKE_WINDOW", 4)
    settings = "train.max_steps=20", "train.checkpoint_every=4"
    with pytest.raises(TrainingError, match="step 10: the loss has been over") as whole:
        train(*settings, doctor=louder_from(6))
    told = rows(tmp_path / "run", "warning")
    assert [row["step"] for row in told] == [6, 7, 8, 9] and "is usual" in told[0]["message"]
    assert max((tmp_path / "run" / "checkpoints").glob("step_*")).name == "step_000008", "between two of the warnings"
    with pytest.raises(TrainingError) as resumed:
        train(*settings, resume=True, doctor=louder_from(1))
    assert str(resumed.value) == str(whole.value) and rows(tmp_path / "run", "warning") == told


# what is kept


@pytest.fixture
def validations(monkeypatch):
    """Make the run find these validation losses, one after another."""

    def validations(*losses):
        found = iter(losses)
        monkeypatch.setattr(sys.modules[run.__module__], "validation_loss", lambda model, batches: next(found))

    return validations


def test_the_weights_of_the_lowest_validation_loss_are_the_ones_that_stay(train, tmp_path, validations):
    validations(4.0, 2.0, 3.0, 2.0, 5.0)
    model, result = train("train.max_steps=5", "train.eval_every=1", "train.keep_checkpoints=1")
    assert (result.weights, result.best_validation_loss, result.steps) == ("best", 2.0, 5)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_000002", "step_000005"]
    assert same(adapters(model), saved(checkpoints / "step_000002"))
    assert not same(adapters(model), saved(checkpoints / "step_000005"))


def test_a_resumed_run_knows_the_best_of_before(train, tmp_path, validations):
    validations(2.0, 3.0)
    settings = "train.eval_every=1", "train.checkpoint_every=2", "train.schedule=constant"
    with pytest.raises(KeyboardInterrupt):
        train(*settings, "train.max_steps=4", doctor=interrupted_at(3))
    validations(2.5, 2.6)
    model, result = train(*settings, "train.max_steps=4", resume=True)
    assert (result.weights, result.best_validation_loss) == ("best", 2.0)
    assert same(adapters(model), saved(tmp_path / "run" / "checkpoints" / "step_000001"))


def test_without_validation_the_last_weights_stay(train, tmp_path):
    model, result = train("train.max_steps=3", "train.checkpoint_every=2")
    assert result.weights == "last" and not (tmp_path / "run" / "checkpoints" / "best").exists()
    assert same(adapters(model), saved(tmp_path / "run" / "checkpoints" / "step_000003"))


def test_a_loss_that_is_no_number_is_not_the_best(train, tmp_path, validations):
    validations(math.nan, 3.0, 4.0)
    _, result = train("train.max_steps=3", "train.eval_every=1")
    assert result.best_validation_loss == 3.0 and result.weights == "best"
    assert (tmp_path / "run" / "checkpoints" / "best").read_text() == "step_000002\n"


def test_the_last_step_is_validated_whatever_the_interval(train, tmp_path):
    train("train.max_steps=5", "train.eval_every=3")
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [3, 5]


def test_a_checkpoint_holds_what_is_trained_and_nothing_of_the_base(train, tmp_path):
    model, _ = train("train.max_steps=1")
    keys = FileSystemReader(tmp_path / "run" / "checkpoints" / "step_000001").read_metadata().state_dict_metadata
    assert {key for key in keys if key.startswith("model.")} == {f"model.{name}" for name in adapters(model)}
    assert not [key for key in keys if ".base." in key or key.endswith("embeddings.weight")]
