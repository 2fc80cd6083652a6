"""What the loop writes down: metrics.jsonl and its copy for TensorBoard, also when a run is resumed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_loop import interrupted_at, rows


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
    settings = "logging.every=4", "train.checkpoint_every=2"
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
    settings = "logging.trackers=[tensorboard]", "train.checkpoint_every=2", "train.eval_every=2"
    with pytest.raises(KeyboardInterrupt):
        train(*settings, "train.max_steps=5", doctor=interrupted_at(4))
    train(*settings, "train.max_steps=5", resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for kind, key in (("train", "loss"), ("train", "grad_norm"), ("eval", "perplexity")):
        told = [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows(tmp_path / "run", kind)]
        assert [(event.step, event.value) for event in events.Scalars(f"{kind}/{key}")] == told
