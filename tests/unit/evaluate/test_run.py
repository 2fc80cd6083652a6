"""`run` asks base and tuned the same held-out rows and leaves them on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from toy_model import ToyModel
from toy_run import TINY, chat_rows

from nemotune.data.prepare import prepare
from nemotune.errors import DataError
from nemotune.evaluate import candidate, check_rows, compare_files, run
from nemotune.evaluate.rows import hold_out, read_rows
from nemotune.models import load_tokenizer
from nemotune.recipe import load


def prepared_run(tmp_path, *overrides):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({**row, "group": "old" if number % 2 else "new"}) + "\n" for number, row in enumerate(chat_rows(30)))
    )
    settings = (
        f"data.train.path={rows}",
        f"model.path={TINY}",
        "data.validation=0.2",
        "data.test=0.2",
        "evaluate.tasks=[perplexity]",
        *overrides,
    )
    recipe, tokenizer = load("quickstart", settings), load_tokenizer(TINY)
    prepared = prepare(recipe, tokenizer, out_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
    return recipe, tokenizer, prepared


def test_base_and_tuned_are_asked_the_same_rows(tmp_path):
    recipe, tokenizer, prepared = prepared_run(tmp_path, "evaluate.max_samples=4")
    for label in ("base", "tuned"):
        model = ToyModel(vocab_size=len(tokenizer))
        summary = run(model, tokenizer, recipe, prepared, label=label, out_dir=tmp_path / "eval")
    rows = {label: read_rows(tmp_path / "eval" / f"{label}.jsonl") for label in ("base", "tuned")}
    assert rows["base"] == rows["tuned"] and len({row.row for row in rows["base"]}) == 4
    assert all(row.groups == {"group": "old" if row.row % 2 else "new"} for row in rows["tuned"])
    assert summary["perplexity"]["loss"]["n"] == len(rows["tuned"])
    compared = compare_files(tmp_path / "eval")
    assert compared["tasks"]["perplexity"]["loss"]["difference"] == 0
    assert compared["asked"] == {"split": "test", "rows": 4, "of": 6}


def test_held_out_rows_are_a_seeded_sample_of_the_split(tmp_path):
    _, _, prepared = prepared_run(tmp_path)
    everything = hold_out(prepared.train, max_samples=None, seed=0)
    few, again, other = (hold_out(prepared.train, max_samples=6, seed=seed) for seed in (0, 0, 1))
    numbers = [[example.meta["row"] for example in held.examples] for held in (few, again, other)]
    assert numbers[0] == numbers[1] != numbers[2]
    assert len(everything.examples) == 18 and numbers[0] == sorted(numbers[0])
    assert {document.row for document in few.documents} == set(numbers[0])


@pytest.mark.parametrize(("setting", "limits"), [("null", [256]), ("7", [7])])
def test_answers_are_as_long_as_the_recipe_says_or_the_task(tmp_path, monkeypatch, setting, limits):
    recipe, tokenizer, prepared = prepared_run(tmp_path, "evaluate.tasks=[tool_calls]", f"evaluate.max_new_tokens={setting}")
    asked = []

    def generate(model, prompts, *, max_new_tokens, **_):
        asked.append(max_new_tokens)
        return [[tokenizer.eos_token_id]] * len(prompts)

    monkeypatch.setattr(candidate, "generate", generate)
    run(ToyModel(vocab_size=len(tokenizer)), tokenizer, recipe, prepared, label="tuned", out_dir=tmp_path / "eval")
    assert asked == limits


def test_a_new_evaluation_removes_the_comparison_of_the_old_one(tmp_path):
    recipe, tokenizer, prepared = prepared_run(tmp_path)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "compare.json").write_text("{}")
    run(ToyModel(vocab_size=len(tokenizer)), tokenizer, recipe, prepared, label="tuned", out_dir=tmp_path / "eval")
    assert not (tmp_path / "eval" / "compare.json").exists()


def test_validation_rows_are_asked_where_there_is_no_test_split(tmp_path):
    recipe, tokenizer, prepared = prepared_run(tmp_path, "data.test=null")
    run(ToyModel(vocab_size=len(tokenizer)), tokenizer, recipe, prepared, label="tuned", out_dir=tmp_path / "eval")
    asked = {row.row for row in read_rows(tmp_path / "eval" / "tuned.jsonl")}
    assert asked == {example.meta["row"] for example in prepared.validation.examples()}


def test_without_held_out_rows_it_is_an_error(tmp_path):
    recipe, tokenizer, prepared = prepared_run(tmp_path)
    nothing = SimpleNamespace(**{**vars(replace(prepared)), "validation": None, "test": None})
    with pytest.raises(DataError, match=r"data\.test: got none"):
        run(ToyModel(vocab_size=len(tokenizer)), tokenizer, recipe, nothing, label="base", out_dir=tmp_path / "eval")
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize("task", ["multiple_choice", "span_qa"])
def test_tasks_that_the_rows_cannot_serve_are_told_without_a_model(tmp_path, task):
    recipe, tokenizer, prepared = prepared_run(tmp_path, f"evaluate.tasks=[perplexity, {task}]")
    with pytest.raises(DataError, match=rf"evaluate\.tasks: {task} needs rows with"):
        check_rows(recipe, prepared, tokenizer)
    check_rows(load("quickstart", ["evaluate.tasks=[perplexity, tool_calls]"]), prepared, tokenizer)
