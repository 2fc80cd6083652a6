"""What a run does with the time that is left before its deadline."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
from rich.console import Console
from toy_loop import Clock
from toy_run import SETTINGS, leave_checkpoint, options

from nemotune.engines import native
from nemotune.errors import RecipeError
from nemotune.recipe import load
from nemotune.train import Deadline
from nemotune.workflow import stages

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def clock(monkeypatch):
    """The time that a command's deadline goes by."""
    clock = Clock()
    monkeypatch.setattr(Deadline, "of", lambda recipe, started: Deadline(100.0, clock=clock))
    return clock


@pytest.mark.parametrize(("trained_at", "evaluated_at", "done"), [(50, 60, ["evaluate", "merge"]), (50, 100, ["evaluate"]), (100, 0, [])])
def test_after_the_deadline_nothing_long_begins_and_what_would_do_it_is_said(
    recipe, tmp_path, monkeypatch, capsys, trained_at_once, clock, trained_at, evaluated_at, done
):
    engine, begun = native.train, []

    def train(*args, **rest):
        clock.now = trained_at
        return engine(*args, **rest)

    def evaluate(*args, **rest):
        clock.now = evaluated_at
        begun.append("evaluate")

    monkeypatch.setattr(native, "train", train)
    monkeypatch.setattr(stages, "evaluate", evaluate)
    monkeypatch.setattr(stages, "merge", lambda *args, **rest: begun.append("merge"))
    stages.run(recipe, resume=False, **options(tmp_path / "run", console=Console(width=400)))
    assert begun == done and (tmp_path / "run" / "report.html").is_file()
    told = [line for line in capsys.readouterr().out.splitlines() if "train.deadline has come" in line]
    assert [line.split("`")[1].split()[1] for line in told] == ["eval", "merge"][len(done) :]


def test_a_training_that_its_deadline_ended_says_how_to_go_on_and_is_not_evaluated(
    recipe, tmp_path, monkeypatch, capsys, trained_at_once, clock
):
    def train(recipe, prepared, *, run_dir, deadline, **_):
        (run_dir / "adapter").mkdir()
        assert not deadline.leaves_time(checkpoint_bytes=1e12, validation_steps=0.0)
        return SimpleNamespace(steps=7, weights="best", ended="stopped at the deadline")

    monkeypatch.setattr(native, "train", train)
    for later in ("evaluate", "merge"):
        monkeypatch.setattr(stages, later, lambda *args, **rest: pytest.fail("began after the deadline"))
    stages.run(recipe, resume=False, **options(tmp_path / "run", console=Console(width=400)))
    told = capsys.readouterr().out
    assert "stopped at the deadline after 7 steps; the best weights are kept; `--resume` goes on" in told
    assert f"next: nemotune run {tmp_path / 'run'} --resume" in told


def test_a_deadline_counts_from_the_start_that_the_command_names(tmp_path, trained_at_once):
    recipe = load("quickstart", [*SETTINGS, "evaluate.tasks=[]", "export.merged=false", "train.deadline=1h"])
    long_ago = time.time() - 3601
    for verb in (stages.run, stages.train):
        with pytest.raises(RecipeError, match="which is past"):
            verb(recipe, resume=False, started=long_ago, **options(tmp_path / "run"))
    stages.run(recipe, resume=False, started=time.time(), **options(tmp_path / "run"))
    leave_checkpoint(tmp_path / "run")
    stages.train(recipe, resume=True, **options(tmp_path / "run"))


def test_a_deadline_in_the_past_is_refused_before_anything_is_written(tmp_path):
    recipe = load("quickstart", [*SETTINGS, "train.deadline=2020-01-01T00:00"])
    for verb in (stages.run, stages.train):
        with pytest.raises(RecipeError, match="^train.deadline: got 2020-01-01T00:00, which is past"):
            verb(recipe, resume=False, **options(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
