"""Evaluations of base and tuned, and the score of one model: which rows they ask, what they hold, what they leave."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from types import SimpleNamespace

import pytest
from rich.console import Console
from toy_run import SETTINGS, options

from nemotune import assets
from nemotune.engines import native
from nemotune.errors import ConflictError
from nemotune.evaluate.rows import read_rows
from nemotune.models import load_tokenizer
from nemotune.recipe import load
from nemotune.workflow import scoring, stages

pytestmark = pytest.mark.usefixtures("own_cache")


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
