"""The stages of a run meet through files, do each thing once, and keep what is for people apart from what is for pipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from toy_run import SETTINGS, leave_checkpoint, options

from nemotune.data import spool
from nemotune.engines import native
from nemotune.errors import ConflictError, DataError, MissingFileError, RecipeError
from nemotune.recipe import load
from nemotune.workflow import stages, training

pytestmark = pytest.mark.usefixtures("own_cache")


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
        (
            ["export.gguf=[q4_k_m, f16]"],
            "adapter, eval, export/merged, export/quickstart-q4_k_m.gguf, export/quickstart-f16.gguf, report.html",
        ),
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


def test_progress_is_on_stderr_and_results_are_on_stdout(recipe, tmp_path, capsys):
    stages.train(recipe, resume=False, **options(tmp_path / "run", console=Console(width=400)))
    printed = capsys.readouterr()
    assert "step 1 of 2: loss" in printed.err and "step 2 of 2: loss" in printed.err
    assert [line.split()[0] for line in printed.out.splitlines()] == ["finished", "wrote"]


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


def test_a_training_with_nothing_to_evaluate_is_followed_by_its_report(recipe, tmp_path, trained_at_once, capsys):
    plain = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"tasks": ()})})
    stages.train(plain, resume=False, **options(tmp_path / "run", console=Console(width=400)))
    assert capsys.readouterr().out.rstrip().endswith(f"next: nemotune report {tmp_path / 'run'}")


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
    with pytest.raises(ConflictError, match="holds .*, which is read"):
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
