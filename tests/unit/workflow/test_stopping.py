"""A training stops after the step under way where a file called `stop` is in its directory, and goes on when it is started again."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from toy_run import SETTINGS, options

from nemotune.errors import RecipeError
from nemotune.recipe import load
from nemotune.train.loop import Loop
from nemotune.workflow import launching, stages

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_training_stops_at_the_file_and_goes_on_without_it(tmp_path, monkeypatch, capsys):
    recipe, run_dir = load("quickstart", [*SETTINGS, "train.max_steps=3"]), tmp_path / "run"
    take_step = Loop.take_step

    def then_stop(loop):
        step = take_step(loop)
        (run_dir / "stop").touch()
        return step

    monkeypatch.setattr(Loop, "take_step", then_stop)
    stages.run(recipe, resume=False, **options(run_dir, console=Console(width=400)))
    told = capsys.readouterr().out
    assert "stopped at the deadline after 1 steps" in told and "left out, since train.deadline has come: `nemotune eval" in told
    monkeypatch.setattr(Loop, "take_step", take_step)
    stages.train(recipe, resume=True, **options(run_dir, console=Console(width=400)))
    assert "finished after 3 steps" in capsys.readouterr().out and not (run_dir / "stop").exists()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "deadline"] == [1] and rows[-1]["step"] == 3


def test_more_processes_than_gpus_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(
        RecipeError, match=r"^parallel.nproc: got 2, and this machine has 1 GPU; set parallel.nproc=1, or have several machines"
    ):
        stages.train(load("quickstart", [*SETTINGS, "parallel.nproc=2"]), resume=False, **options(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    launching.require_gpus(1)
