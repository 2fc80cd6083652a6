"""What the loop keeps: the best weights, what a checkpoint holds, when validation is due."""

from __future__ import annotations

import io
import math
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.distributed.checkpoint import FileSystemReader
from toy_loop import interrupted_at, rows

from nemotune.errors import CheckpointError
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
        monkeypatch.setattr(validation, "validation_loss", lambda model, batches, world: next(found))

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


def test_a_run_killed_as_its_best_checkpoint_is_there_keeps_those_very_weights(train, tmp_path, validations, monkeypatch):
    validations(3.0, 2.0)
    settings = "train.max_steps=2", "train.eval_every=1"
    replace = os.replace

    def killed(source, target):
        replace(source, target)
        if Path(target).name == "step_000002":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", killed)
        train(*settings)
    model, result = train(*settings, resume=True)
    assert (result.weights, result.best_validation_loss) == ("best", 2.0)
    assert same(adapters(model), saved(tmp_path / "run" / "checkpoints" / "step_000002"))


def test_a_best_checkpoint_that_is_gone_is_told_and_the_best_counts_anew(train, tmp_path, validations):
    validations(2.0, 1.0)
    settings = "train.checkpoint_every=2", "train.eval_every=3"
    train(*settings, "train.max_steps=6")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000006")  # as the error about a damaged one says; step 3 went when 6 was better
    validations(2.5, 2.6)
    told = io.StringIO()
    model, result = train(*settings, "train.max_steps=9", resume=True, console=Console(file=told, width=200))
    assert "no checkpoint is left of the lowest validation loss so far, 2.0000: it counts anew from here" in told.getvalue()
    assert (result.weights, result.best_validation_loss) == ("best", 2.5)
    assert same(adapters(model), saved(tmp_path / "run" / "checkpoints" / "step_000006"))


def test_a_run_that_stopped_early_goes_on_where_its_best_checkpoint_is_gone(train, tmp_path, validations):
    validations(2.0, 3.0, 3.5)
    settings = "train.max_steps=5", "train.eval_every=1", "train.early_stopping=2"
    assert train(*settings)[1].ended == "stopped early"
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000001")
    validations(5.0, 6.0)
    _, result = train(*settings, resume=True)
    assert (result.steps, result.weights, result.best_validation_loss) == (5, "best", 5.0)


def test_checkpoints_that_lost_a_file_are_not_kept_in_place_of_whole_ones(train, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    train("train.max_steps=6", "train.checkpoint_every=2")
    (checkpoints / "step_000006" / "trainer.json").unlink()
    (checkpoints / "step_000007").mkdir()
    settings = "train.max_steps=9", "train.checkpoint_every=1", "train.keep_checkpoints=1"
    with pytest.raises(KeyboardInterrupt):
        train(*settings, resume=True, doctor=interrupted_at(2))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000005", "step_000006", "step_000007"]
    told = io.StringIO()
    train(*settings, resume=True, console=Console(file=told, width=200))
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == list(range(1, 10))
    said = [line for line in told.getvalue().splitlines() if "passed over" in line]
    assert said == [f"{checkpoints / name}: damaged ({why} is missing), passed over" for name, why in (("step_000007", "trainer.json"), ("step_000006", "trainer.json"))]  # fmt: skip


@pytest.mark.parametrize("lost", ["trainer.json", ".metadata"])
def test_a_resume_whose_every_checkpoint_lost_a_file_leaves_the_record(train, tmp_path, lost):
    train("train.max_steps=4", "train.checkpoint_every=2")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / lost).unlink()
    before = rows(tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=rf"got step_000002 \({lost} is missing\), step_000004 \({lost} is missing\), none that is whole.*--overwrite"
    ):
        train("train.max_steps=4", resume=True)
    assert rows(tmp_path / "run") == before


def test_without_validation_the_last_weights_stay(train, tmp_path):
    model, result = train("train.max_steps=3", "train.checkpoint_every=2")
    assert result.weights == "last" and result.best_validation_loss is None
    assert same(adapters(model), saved(tmp_path / "run" / "checkpoints" / "step_000003"))


def test_a_loss_that_is_no_number_is_not_the_best(train, tmp_path, validations):
    validations(math.nan, 3.0, 4.0)
    model, result = train("train.max_steps=3", "train.eval_every=1")
    assert result.best_validation_loss == 3.0 and result.weights == "best"
    assert same(adapters(model), saved(tmp_path / "run" / "checkpoints" / "step_000002"))


def test_the_last_step_is_validated_whatever_the_interval(train, tmp_path):
    train("train.max_steps=5", "train.eval_every=3")
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [3, 5]


def test_a_checkpoint_holds_what_is_trained_and_nothing_of_the_base(train, tmp_path):
    model, _ = train("train.max_steps=1")
    keys = FileSystemReader(tmp_path / "run" / "checkpoints" / "step_000001").read_metadata().state_dict_metadata
    assert {key for key in keys if key.startswith("model.")} == {f"model.{name}" for name in adapters(model)}
    assert not [key for key in keys if ".base." in key or key.endswith("embeddings.weight")]
