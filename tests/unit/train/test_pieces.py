"""How many steps a run has, and the rows that a resumed one replaces."""

from __future__ import annotations

import pytest

from nemotune.recipe import load
from nemotune.train.metrics import Metrics, read_metrics
from nemotune.train.run import count_steps


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
