"""The stages of a run meet through files, do each thing once, and keep what is for people apart from what is for pipes."""

from __future__ import annotations

import gc
import json
import shutil
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from toy_loop import Clock

from nemotune import assets
from nemotune.data import spool
from nemotune.engines import native
from nemotune.errors import ConflictError, DataError, MissingFileError, RecipeError
from nemotune.evaluate.rows import read_rows
from nemotune.models import load_tokenizer
from nemotune.recipe import load
from nemotune.train import Deadline
from nemotune.workflow import scoring, stages, training

SETTINGS = (
    "data.max_samples=12", "data.test=0.2", "data.validation=null", "data.sequence_length=512", "train.eval_every=null", "train.max_steps=2",
    "train.micro_batch_size=1", "train.global_batch_size=1", "logging.trackers=[]", "evaluate.tasks=[perplexity]", "evaluate.max_samples=2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMOTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe():
    return load("quickstart", SETTINGS)


@pytest.fixture
def trained_at_once(monkeypatch):
    """An engine that leaves the directory of what was trained, and nothing in it."""

    def train(recipe, prepared, *, run_dir, **_):
        (run_dir / native.trained_name(recipe)).mkdir(exist_ok=True)
        (run_dir / "metrics.jsonl").touch()
        return SimpleNamespace(steps=2, weights="last", ended="finished")

    monkeypatch.setattr(native, "train", train)


def leave_checkpoint(run_dir):
    """What a resume looks for, and nothing in it."""
    whole = run_dir / "checkpoints" / "step_000002"
    whole.mkdir(parents=True)
    for name in ("trainer.json", ".metadata"):
        (whole / name).touch()


def options(run_dir, **changed):
    return {"run_dir": run_dir, "overwrite": False, "dry_run": False, "console": Console(quiet=True), **changed}


def test_a_run_reads_its_rows_once(recipe, tmp_path, monkeypatch, trained_at_once):
    read, rows = [], spool.iter_rows
    monkeypatch.setattr(spool, "iter_rows", lambda source: read.append(source.path) or rows(source))
    for later in ("evaluate", "merge", "report"):
        monkeypatch.setattr(stages, later, lambda *args, **kwargs: None)
    stages.run(recipe, resume=False, **options(tmp_path / "run"))
    assert read == ["nemotron-tiny/train.jsonl"]
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]["train"]["max_steps"] == 2


UNASKABLE = [
    (["data.test=null"], "^evaluate.tasks: got perplexity, and no held-out rows to ask: set data.test=0.02"),
    (["evaluate.tasks=[perplexity, span_qa]"], "^evaluate.tasks: span_qa needs data.format: squad, got chat; choose another task$"),
]


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(("changes", "message"), UNASKABLE)
def test_tasks_that_the_recipe_cannot_serve_are_refused_before_any_work(tmp_path, changes, message, dry_run):
    with pytest.raises(RecipeError, match=message):
        stages.run(load("quickstart", [*SETTINGS, *changes]), resume=False, **options(tmp_path / "run", dry_run=dry_run))
    assert not (tmp_path / "run").exists()


def test_tasks_that_the_rows_cannot_serve_are_refused_before_training(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]
    rows.write_text("".join(json.dumps({"messages": [{**turns[0], "content": f"How many {n}?"}, turns[1]]}) + "\n" for n in range(12)))
    recipe = load("quickstart", [*SETTINGS, f"data.train={rows}", "evaluate.tasks=[tool_calls]"])
    monkeypatch.setattr(native, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(DataError, match="^evaluate.tasks: tool_calls needs conversations with tools"):
        stages.run(recipe, resume=False, **options(tmp_path / "run"))


def test_a_dry_run_refuses_what_the_run_will_refuse(recipe, tmp_path, trained_at_once):
    for verb in (stages.run, stages.train):
        with pytest.raises(MissingFileError, match=r"nowhere\.jsonl: no such file"):
            verb(load("quickstart", [*SETTINGS, "data.train=nowhere.jsonl"]), resume=False, **options(tmp_path / "new", dry_run=True))
    with pytest.raises(MissingFileError, match="nothing trained yet"):
        stages.evaluate(recipe, **options(tmp_path / "new", dry_run=True))
    with pytest.raises(MissingFileError, match=r"nowhere\.jsonl: no such file"):
        stages.data(load("quickstart", [*SETTINGS, "data.test=nowhere.jsonl"]), show=0, **options(tmp_path / "new", dry_run=True))
    stages.train(recipe, resume=False, **options(tmp_path / "run"))
    for verb in (stages.run, stages.train):
        with pytest.raises(ConflictError, match="holds a run already"):
            verb(recipe, resume=False, **options(tmp_path / "run", dry_run=True))
    (tmp_path / "run" / "eval").mkdir()
    with pytest.raises(ConflictError, match="holds an evaluation already"):
        stages.evaluate(recipe, **options(tmp_path / "run", dry_run=True))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ([], "adapter, eval, export, report.html"),
        (["export.merged=false"], "adapter, eval, report.html"),
        (["export.merged=false", "evaluate.tasks=[]", "method=full"], "model, report.html"),
    ],
)
def test_a_dry_run_lists_what_this_recipe_will_leave(tmp_path, capsys, changes, left):
    stages.run(
        load("quickstart", [*SETTINGS, *changes]), resume=False, **options(tmp_path / "run", dry_run=True, console=Console(width=400))
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"would write {tmp_path / 'run'}/: data, metrics.jsonl, checkpoints, {left}"


def test_only_the_last_stage_of_a_run_says_what_to_type_next(recipe, tmp_path, capsys):
    stages.run(recipe, resume=False, **options(tmp_path / "run", console=Console(width=400)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrote")]
    assert [Path(line.split()[1]).name for line in lines] == ["data", "adapter", "eval", "merged", "report.html"]
    assert [line for line in lines if "next:" in line] == lines[-1:]


def test_an_evaluation_says_which_rows_it_asked_and_removes_the_report_of_the_earlier_one(recipe, tmp_path, capsys, monkeypatch):
    stages.run(recipe, resume=False, **options(tmp_path / "run"))
    assert (tmp_path / "run" / "report.html").is_file()
    seeds, compare = [], scoring.compare_files
    monkeypatch.setattr(scoring, "compare_files", lambda directory, seed: seeds.append(seed) or compare(directory, seed=seed))
    stages.evaluate(recipe, **options(tmp_path / "run", overwrite=True, console=Console(width=400)))
    assert "asked: 2 of 2 rows of test" in capsys.readouterr().out
    assert not (tmp_path / "run" / "report.html").exists()
    assert seeds == [recipe.train.seed] == [42]


def test_a_model_alone_is_scored_beside_the_run(recipe, tmp_path, capsys):
    run_dir = tmp_path / "run"
    stages.score(recipe, model="nemotron-tiny", **options(run_dir))
    before = json.loads((run_dir / "scores" / "nemotron-tiny" / "asked.json").read_text())
    stages.run(recipe, resume=False, **options(run_dir))
    base, alone = (read_rows(path) for path in (run_dir / "eval" / "base.jsonl", run_dir / "scores" / "nemotron-tiny" / "model.jsonl"))
    assert base == alone and before == json.loads((run_dir / "eval" / "asked.json").read_text())

    stages.score(recipe, model=str(run_dir / "export" / "merged"), **options(run_dir, console=Console(width=400)))
    told = capsys.readouterr().out
    merged, tuned = (read_rows(path) for path in (run_dir / "scores" / "merged" / "model.jsonl", run_dir / "eval" / "tuned.jsonl"))
    assert [row.key for row in merged] == [row.key for row in tuned]
    assert "asked: 2 of 2 rows of test" in told and "perplexity" in told and f"wrote {run_dir / 'scores' / 'merged'}" in told
    with pytest.raises(ConflictError, match="scores/merged: holds scores already; --overwrite replaces them"):
        stages.score(recipe, model=str(run_dir / "export" / "merged"), **options(run_dir, dry_run=True))
    stages.train(recipe, resume=False, **options(run_dir, overwrite=True))
    assert not (run_dir / "scores").exists()


def test_a_model_of_another_tokenizer_is_not_scored_in_the_recipes_tokens(recipe, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(assets.resolve("nemotron-tiny"), other)
    tokenizer = load_tokenizer(other)
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(other)
    for dry_run in (True, False):
        with pytest.raises(ConflictError, match=r"^--model: .*other has another tokenizer than the recipe's model.path \(nemotron-tiny\)"):
            stages.score(recipe, model=str(other), **options(tmp_path / "run", dry_run=dry_run))
    assert not (tmp_path / "run").exists()


def test_progress_is_on_stderr_and_results_are_on_stdout(recipe, tmp_path, capsys):
    stages.train(recipe, resume=False, **options(tmp_path / "run", console=Console(width=400)))
    printed = capsys.readouterr()
    assert "step 1 of 2: loss" in printed.err and "step 2 of 2: loss" in printed.err
    assert [line.split()[0] for line in printed.out.splitlines()] == ["finished", "wrote"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_evaluation_holds_one_model_at_a_time(tmp_path, monkeypatch, trained_at_once, method):
    recipe = load("quickstart", [*SETTINGS, f"method={method}", "export.merged=false"])
    stages.train(recipe, resume=False, **options(tmp_path / "run"))
    alive: weakref.WeakSet = weakref.WeakSet()
    most, asked = [], []

    class Model:
        def eval(self):
            return self

    def load_model(path, **settings):
        gc.collect()
        alive.add(model := Model())
        most.append(len(alive))
        return model

    def run_evaluation(model, tokenizer, recipe, prepared, *, label, out_dir):
        asked.append(label)
        (out_dir / f"{label}.jsonl").touch()
        return {}

    for module in (scoring, native):
        monkeypatch.setattr(module, "load_model", load_model)
    monkeypatch.setattr(scoring, "load_adapter", lambda model, directory: None)
    monkeypatch.setattr(scoring, "run_evaluation", run_evaluation)
    monkeypatch.setattr(scoring, "compare_files", lambda directory, seed: {"tasks": {}})
    monkeypatch.setattr(scoring, "comparison_table", str)
    stages.evaluate(recipe, **options(tmp_path / "run"))
    assert asked == ["base", "tuned"] and most == ([1] if method == "lora" else [1, 1])


def test_an_evaluation_that_breaks_off_leaves_the_earlier_one(recipe, tmp_path, monkeypatch, trained_at_once):
    stages.train(recipe, resume=False, **options(tmp_path / "run"))
    (tmp_path / "run" / "eval").mkdir()
    (tmp_path / "run" / "eval" / "tuned.jsonl").write_text("earlier")

    def interrupted(*args, out_dir, **kwargs):
        (out_dir / "base.jsonl").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "load_model", lambda path, **settings: SimpleNamespace(eval=lambda: None))
    monkeypatch.setattr(scoring, "run_evaluation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stages.evaluate(recipe, **options(tmp_path / "run", overwrite=True))
    assert [file.read_text() for file in (tmp_path / "run" / "eval").iterdir()] == ["earlier"]
    assert not list((tmp_path / "run").glob(".*"))


def test_training_on_discards_what_was_made_from_the_earlier_weights(recipe, tmp_path, trained_at_once):
    run_dir = tmp_path / "run"
    stages.train(recipe, resume=False, **options(run_dir))
    for name in ("eval", "export"):
        (run_dir / name).mkdir()
    leave_checkpoint(run_dir)
    stages.train(recipe, resume=True, **options(run_dir))
    left = ["adapter", "checkpoints", "data", "environment.json", "metrics.jsonl", "recipe.json"]
    assert sorted(path.name for path in run_dir.iterdir()) == left


def test_a_recipe_without_tasks_runs_to_its_report_and_is_no_evaluation(recipe, tmp_path, trained_at_once):
    recipe = load("quickstart", [*SETTINGS, "evaluate.tasks=[]", "export.merged=false"])
    stages.run(recipe, resume=False, **options(tmp_path / "run"))
    assert (tmp_path / "run" / "report.html").is_file() and not (tmp_path / "run" / "eval").exists()
    with pytest.raises(RecipeError, match="nothing to evaluate"):
        stages.evaluate(recipe, **options(tmp_path / "run"))


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


def test_two_processes_do_not_train_in_one_run(recipe, tmp_path, monkeypatch, trained_at_once):
    run_dir, engine = tmp_path / "run", native.train
    refused = []

    def train_while_another_tries(recipe, prepared, *, run_dir, **rest):
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)  # what the other sees before the first step
        for resume in (False, True):
            with pytest.raises(ConflictError, match="another process is training in it"):
                stages.train(recipe, resume=resume, **options(run_dir))
            refused.append(resume)
        return engine(recipe, prepared, run_dir=run_dir)

    monkeypatch.setattr(native, "train", train_while_another_tries)
    stages.train(recipe, resume=False, **options(run_dir))
    assert refused == [False, True]
    monkeypatch.setattr(native, "train", engine)
    leave_checkpoint(run_dir)
    stages.train(recipe, resume=True, **options(run_dir))


def test_a_run_that_another_process_finished_meanwhile_is_not_trained_again(recipe, tmp_path, monkeypatch, trained_at_once):
    prepare = training.prepare

    def slow_prepare(*args, out_dir, **settings):
        prepared = prepare(*args, out_dir=out_dir, **settings)
        (out_dir.parent / "metrics.jsonl").touch()
        (out_dir.parent / "recipe.json").touch()
        return prepared

    monkeypatch.setattr(training, "prepare", slow_prepare)
    with pytest.raises(ConflictError, match="holds a run already"):
        stages.train(recipe, resume=False, **options(tmp_path / "run"))


def test_odd_paths_are_told_as_they_are_and_quoted_in_what_to_type_next(recipe, tmp_path, trained_at_once, capsys):
    odd, console = tmp_path / "my [red] run", Console(width=40)
    stages.run(recipe, resume=False, **options(odd, dry_run=True, console=console))
    stages.data(recipe, show=0, **options(odd, dry_run=True, console=console))
    stages.train(recipe, resume=False, **options(odd, console=console))
    lines = [line for line in capsys.readouterr().out.splitlines() if "wr" in line or "would" in line]
    assert len(lines) == 3 and all("my [red] run" in line for line in lines)
    assert lines[-1] == f"wrote {odd / 'adapter'}   next: nemotune eval '{odd}'"


def mine(directory):
    """A directory of the user's own with a file in it."""
    directory.mkdir(parents=True)
    (directory / "thesis.tex").write_text("years of work")
    return directory


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["data", "model", "export"])
def test_a_directory_that_is_no_run_is_left_alone(recipe, tmp_path, trained_at_once, name, overwrite):
    mine(tmp_path / name)
    with pytest.raises(ConflictError, match="move"):
        stages.train(recipe, resume=False, **options(tmp_path, overwrite=overwrite))
    assert [(tmp_path / name / "thesis.tex").read_text()] == ["years of work"]
    assert not (tmp_path / "recipe.json").exists()


def test_rows_are_not_prepared_over_something_else(recipe, tmp_path):
    mine(tmp_path / "data")
    with pytest.raises(ConflictError, match=r"data: is not prepared data \(no stats\.json\)"):
        stages.data(recipe, show=0, **options(tmp_path, overwrite=True))
    assert (tmp_path / "data" / "thesis.tex").is_file()


@pytest.fixture
def adapted(recipe, tmp_path):
    """A trained run."""
    stages.train(recipe, resume=False, **options(tmp_path / "run"))
    return tmp_path / "run"


def test_a_merge_replaces_nothing_but_a_model(recipe, adapted, tmp_path, monkeypatch):
    def merge(output):
        stages.merge(recipe, output=output, **options(adapted, overwrite=True))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("years of work")
    for output in (mine(tmp_path / "papers"), adapted, adapted / "adapter", tmp_path, Path("file"), Path()):
        with pytest.raises(ConflictError, match="--overwrite"):
            merge(output)
    assert (tmp_path / "papers" / "thesis.tex").is_file() and (tmp_path / "file").is_file() and (adapted / "recipe.json").is_file()
    merge(tmp_path / "out")
    merge(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    base = load("quickstart", [*SETTINGS, f"model.path={tmp_path / 'out'}"])
    stages.train(base, resume=False, **options(tmp_path / "second"))
    with pytest.raises(ConflictError, match="holds the base"):
        stages.merge(base, output=tmp_path / "out", **options(tmp_path / "second", overwrite=True))


def test_a_trained_model_whose_checkpoints_are_gone_is_not_replaced_by_a_resume(recipe, tmp_path, trained_at_once):
    stages.train(recipe, resume=False, **options(tmp_path / "run"))
    with pytest.raises(ConflictError, match=r"run/adapter: no checkpoint is left to go on from; --overwrite trains anew"):
        stages.train(recipe, resume=True, **options(tmp_path / "run"))


def test_resuming_without_a_checkpoint_says_so(recipe, tmp_path, trained_at_once, capsys):
    stages.train(recipe, resume=True, **options(tmp_path / "run"))
    (tmp_path / "run" / "adapter").rmdir()  # as where the process was killed before its first checkpoint
    stages.train(recipe, resume=True, **options(tmp_path / "run"))
    assert capsys.readouterr().err.splitlines() == [f"no checkpoint in {tmp_path / 'run'} to resume from: begins with step 1"] * 2
    leave_checkpoint(tmp_path / "run")
    stages.train(recipe, resume=True, **options(tmp_path / "run"))
    assert capsys.readouterr().err == ""
