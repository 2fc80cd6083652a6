"""What each process of a run does: one that nemotune started trains, one that torchrun started also prepares and opens, if it is the first."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from toy_run import SETTINGS, leave_checkpoint, options

from nemotune.cli.options import carry_out
from nemotune.data.prepare import Prepared
from nemotune.engines import native
from nemotune.errors import ConflictError, RecipeError, UnsupportedError
from nemotune.files import write_json
from nemotune.recipe import load
from nemotune.train import Deadline, TrainResult
from nemotune.workflow import launching, processes, ranks, stages

pytestmark = pytest.mark.usefixtures("own_cache")
RESULT = TrainResult(steps=2, loss=0.5, best_validation_loss=None, weights="last", ended="stopped at the deadline")


@pytest.fixture
def recipe():
    return load("quickstart", [*SETTINGS, "parallel.nproc=2"])


@pytest.fixture
def one_of_two(monkeypatch, tmp_path):
    """Makes this process one that torchrun started, in a world whose barrier is noted, with an engine that notes how it was called."""
    calls: list[Any] = []
    monkeypatch.setattr(ranks, "end_with_parent", lambda: calls.append("ends with its parent"))
    world = SimpleNamespace(barrier=lambda: calls.append("barrier"), any=lambda said: said or "another" in calls)
    monkeypatch.setattr(ranks, "start", lambda degrees: contextlib.nullcontext(world))

    def train(recipe, prepared, *, world, run_dir, resume, deadline, console):
        calls.append(
            {"rows": len(prepared.train), "resume": resume, "deadline": deadline.at, "recorded": (run_dir / "recipe.json").is_file()}
        )
        print("the engine speaks")
        (run_dir / "adapter").mkdir(exist_ok=True)
        (run_dir / "metrics.jsonl").touch()
        return RESULT

    monkeypatch.setattr(native, "train", train)

    def become(rank: int, *, restarts: int = 0, launch_dir=None, another_restarted: bool = False):
        calls[:] = ["another"] * another_restarted
        for name, value in {
            "RANK": rank,
            "WORLD_SIZE": 2,
            "TORCHELASTIC_RESTART_COUNT": restarts,
            processes.LAUNCH_DIR: launch_dir,
        }.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, str(value))
        return calls

    return become


def test_of_torchruns_processes_the_first_prepares_and_opens_and_all_train(recipe, tmp_path, one_of_two, capsys):
    calls = one_of_two(0)
    stages.train(recipe, resume=False, **options(tmp_path / "run", console=Console(width=400)))
    assert calls[1] == "barrier" and calls[2]["recorded"] and not calls[2]["resume"] and len(calls) == 3
    assert "the engine speaks" in (told := capsys.readouterr().out) and "stopped at the deadline after 2 steps" in told
    rows = calls[2]["rows"]
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.json"))
    calls = one_of_two(1)
    stages.train(recipe, resume=False, **options(tmp_path / "run", console=Console(width=400)))
    assert calls[1:] == ["barrier", {"rows": rows, "resume": False, "deadline": None, "recorded": True}]
    assert capsys.readouterr().out == ""
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.json")) == before


def test_a_process_that_was_started_again_resumes_and_never_overwrites(recipe, tmp_path, one_of_two):
    run_dir = tmp_path / "run"
    calls = one_of_two(0)
    stages.train(recipe, resume=False, **options(run_dir))
    with pytest.raises(ConflictError, match="holds a run already"):
        stages.train(recipe, resume=False, **options(run_dir))
    leave_checkpoint(run_dir)
    for rank, where in ((0, {"restarts": 1}), (1, {"restarts": 1}), (0, {"another_restarted": True})):  # each machine counts its own
        calls = one_of_two(rank, **where)
        stages.train(recipe, resume=False, **options(run_dir, overwrite=True))
        assert calls[-1]["resume"]
        assert (run_dir / "checkpoints" / "step_000002").is_dir()


def test_a_dry_run_under_torchrun_is_told_once(recipe, tmp_path, one_of_two, capsys):
    for rank, lines in ((0, 1), (1, 0)):
        calls = one_of_two(rank)
        stages.train(recipe, resume=False, **options(tmp_path / "run", dry_run=True, console=Console(width=400)))
        assert capsys.readouterr().out.count("would write") == lines and len(calls) == 1
    assert not (tmp_path / "run").exists()


def test_another_number_of_processes_than_the_recipes_is_refused(tmp_path, one_of_two):
    one_of_two(0)
    with pytest.raises(RecipeError, match=r"^parallel.nproc: got 1, and torchrun started 2 processes \(WORLD_SIZE\); set parallel.nproc=2"):
        stages.train(load("quickstart", SETTINGS), resume=False, **options(tmp_path / "run"))


@pytest.mark.parametrize("verb", ["run", "data", "eval", "merge"])
def test_under_torchrun_other_verbs_than_train_are_refused(verb, one_of_two):
    one_of_two(1)
    with pytest.raises(
        UnsupportedError, match=rf"^nemotune {verb}: got 2 processes from torchrun, expected one; .* With torchrun: nemotune train$"
    ):
        carry_out(verb, "quickstart", [], None)


def test_a_training_is_prepared_and_opened_here_and_done_elsewhere(recipe, tmp_path, monkeypatch):
    """`start` is torchrun with the real command; here the command's environment and words are looked at, and its outcome is written."""
    started: list[Any] = []

    def start(command, *, nproc, launch_dir, console):
        run_dir = tmp_path / "run"
        assert (run_dir / "recipe.json").is_file() and Prepared.load(run_dir / "data").train
        started.append((command, nproc, json.loads((launch_dir / "launch.json").read_text())))
        (run_dir / "adapter").mkdir(exist_ok=True)
        (run_dir / "metrics.jsonl").touch()
        write_json(launch_dir / "result.json", asdict(RESULT))

    monkeypatch.setattr(launching, "start", start)
    monkeypatch.setattr(native, "train", lambda *_, **__: pytest.fail("trained here"))
    monkeypatch.chdir(tmp_path)
    timed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"deadline": "1h"})})
    stages.train(timed, resume=False, started=4e9, **options(tmp_path / "run"))
    [(command, nproc, launch)] = started
    assert (command, nproc) == (["-m", "nemotune", "train", str(tmp_path / "run")], 2) and launch == {"deadline": 4e9 + 3600}
    (tmp_path / "run" / "checkpoints").mkdir()
    leave_checkpoint(tmp_path / "run")
    stages.train(recipe, resume=True, **options(tmp_path / "run"))
    assert started[1][0][-1] == "--resume" and started[1][2] == {"deadline": None}


def test_stages_after_a_training_elsewhere_know_that_its_deadline_came(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "start", lambda *_, launch_dir, **__: write_json(launch_dir / "result.json", asdict(RESULT)))
    deadline = Deadline(9e9)
    assert launching.train(recipe, None, run_dir=tmp_path, resume=False, console=Console(), deadline=deadline) == RESULT
    assert deadline.has_come()


def test_a_process_that_nemotune_started_trains_and_the_first_tells_the_outcome(recipe, tmp_path, one_of_two, monkeypatch):
    stages.data(recipe, show=0, **options(tmp_path / "run"))
    for rank, restarts in ((1, 0), (0, 1)):
        launch_dir = tmp_path / f"launch-{rank}"
        launch_dir.mkdir()
        write_json(launch_dir / "launch.json", {"deadline": 9e9})
        calls = one_of_two(rank, restarts=restarts, launch_dir=launch_dir)
        stages.train(recipe, resume=False, **options(tmp_path / "run"))
        [_, call] = calls
        assert call["deadline"] == 9e9 and call["resume"] == (restarts > 0)
        assert (launch_dir / "result.json").is_file() == (rank == 0)
    assert TrainResult(**json.loads((tmp_path / "launch-0" / "result.json").read_text())) == RESULT
