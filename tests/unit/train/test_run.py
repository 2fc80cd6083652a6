"""What the loop keeps: the best weights, what a checkpoint holds, when validation is due."""

from __future__ import annotations

import io
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.distributed.checkpoint import FileSystemReader
from toy_loop import interrupted_at, rows

from nemotune.train import run, validation


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


def test_the_run_says_which_8_bit_optimiser_it_found(train, monkeypatch):
    monkeypatch.setattr(sys.modules[run.__module__], "describe", lambda optimizer: f"one of {type(optimizer).__name__}'s kind")
    told = io.StringIO()
    train("train.max_steps=1", console=Console(file=told))
    assert "one of AdamW's kind" in told.getvalue()


@pytest.fixture
def validations(monkeypatch):
    """Make the run find these validation losses, one after another."""

    def validations(*losses):
        found = iter(losses)
        monkeypatch.setattr(validation, "validation_loss", lambda model, batches: next(found))

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
    settings = "train.eval_every=1", "train.checkpoint_every=2"
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
