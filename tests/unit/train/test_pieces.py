"""Schedules, steps and the rows that a resumed run replaces."""

from __future__ import annotations

import pytest

from nemotune.recipe import Train, load
from nemotune.train.metrics import Metrics, read_metrics
from nemotune.train.run import count_steps
from nemotune.train.schedule import learning_rate, warmup_steps


def test_warmup_rises_to_the_rate_and_the_cosine_ends_at_its_minimum():
    train = Train(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate(step, 100, train) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[52] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("schedule, at_half, at_end", [("linear", 0.5, 0.01), ("constant", 1.0, 1.0), ("wsd", 1.0, 0.05)])
def test_schedules_have_their_shape(schedule, at_half, at_end):
    train = Train(learning_rate=1.0, schedule=schedule, warmup_steps=0)
    assert learning_rate(50, 100, train) == pytest.approx(at_half)
    assert learning_rate(99, 100, train) == pytest.approx(at_end, abs=1e-9)


def test_no_warmup_starts_at_the_full_rate():
    assert learning_rate(0, 10, Train(learning_rate=0.5, warmup_ratio=0.0)) == 0.5


@pytest.mark.parametrize("ratio, total, steps", [(0.07, 100, 7), (0.03, 100, 3), (0.03, 110, 4), (1e-5, 100, 1), (0, 100, 0)])
def test_warmup_is_the_share_as_it_is_written_rounded_up(ratio, total, steps):
    assert warmup_steps(total, Train(warmup_ratio=ratio)) == steps


@pytest.mark.parametrize("epochs, steps", [(1.1, 121), (0.07, 8), (0.3, 33), (3, 330)])
def test_epochs_are_counted_as_they_are_written(epochs, steps):
    assert count_steps(110, load("quickstart", [f"train.epochs={epochs}"])) == steps


def test_resumed_metrics_replace_the_rows_after_the_checkpoint(tmp_path):
    first = Metrics(tmp_path, ())
    for step in range(1, 6):
        first.write("train", step, loss=float(step))
    first.close()
    (tmp_path / "metrics.jsonl").open("a").write('{"kind": "train", "ste')
    second = Metrics(tmp_path, (), resume_step=3)
    second.write("train", 4, loss=40.0)
    second.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
