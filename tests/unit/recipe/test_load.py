"""A recipe from YAML and overrides: what is accepted, and how what is not is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemotune.errors import MissingFileError, NemotuneError, RecipeError
from nemotune.recipe import Data, Model, Recipe, builtin_names, dump, json_schema, load

DATE = "or a date and time such as '2026-05-01T18:00'"
MINIMAL = """
name: mine
model: {path: some/model}
data: {format: chat, train: rows.jsonl}
"""


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems(*overrides: str, name: str = "quickstart") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(name, overrides)
    return str(caught.value).splitlines()


def test_file_becomes_a_recipe_with_every_default(tmp_path: Path) -> None:
    recipe = load(written(tmp_path / "mine.yaml", MINIMAL))
    assert recipe == Recipe.model_validate(
        {"name": "mine", "model": {"path": "some/model"}, "data": {"format": "chat", "train": {"path": "rows.jsonl"}}}
    )
    assert recipe.train.learning_rate == 2e-4


def test_dump_loads_to_the_same_recipe(tmp_path: Path) -> None:
    for name in builtin_names():
        recipe = load(name)
        assert load(written(tmp_path / f"{name}.json", json.dumps(dump(recipe)))) == recipe


def test_run_directory_gives_its_recipe(tmp_path: Path) -> None:
    recipe = load("quickstart", ["train.epochs=7"])
    written(tmp_path / "recipe.json", json.dumps({"recipe": dump(recipe), "versions": {}}))
    assert load(str(tmp_path)) == recipe
    assert load(str(tmp_path), ["train.epochs=8"]).train.epochs == 8


def test_overrides_are_typed_by_the_schema() -> None:
    recipe = load(
        "quickstart",
        [
            "train.epochs=0.5",
            "train.learning_rate=2e-4",
            "train.max_steps=10",
            "train.eval_every=null",
            "train.betas=[0.9, 0.95]",
            "lora.targets=[q_proj, v_proj]",
            "export.gguf=[]",
            "export.merged=false",
            "model.revision=1234567",
            "data.test=null",
        ],
    )
    assert (recipe.train.epochs, recipe.train.learning_rate, recipe.train.max_steps, recipe.train.eval_every) == (0.5, 2e-4, 10, None)
    assert (recipe.train.betas, recipe.lora.targets, recipe.export.merged, recipe.data.test) == (
        (0.9, 0.95),
        ("q_proj", "v_proj"),
        False,
        None,
    )
    assert recipe.model.revision == "1234567"


@pytest.mark.parametrize(("typed", "kept"), [("12e4567", "12e4567"), ("0123", "0123"), ("null", None), ("main", "main"), ("'7'", "7")])
def test_text_field_keeps_what_was_typed(typed: str, kept: str | None) -> None:
    assert load("quickstart", [f"model.revision={typed}"]).model.revision == kept


def test_nested_override_opens_the_short_form_of_rows() -> None:
    data = load("quickstart", ["data.train=a.jsonl", "data.train.split=train", "data.validation=0.1", "data.test.path=b.jsonl"]).data
    assert (data.train.path, data.train.split) == ("a.jsonl", "train")
    assert data.validation == 0.1
    assert not isinstance(data.test, float | None) and data.test.path == "b.jsonl"


def test_rows_replaced_whole_forget_their_split() -> None:
    train = load("glaive-nano-4b", ["data.train=mine.jsonl"]).data.train
    assert (train.path, train.split) == ("mine.jsonl", None)


@pytest.mark.parametrize(
    ("text", "number"), [("2e-4", 2e-4), ("2.0e-4", 2e-4), ("1E3", 1e3), ("5e-06", 5e-6), ("0.0002", 2e-4), ("+1e+2", 100.0), ("1", 1.0)]
)
def test_scientific_notation_is_a_number_in_files_and_overrides(tmp_path: Path, text: str, number: float) -> None:
    assert load(written(tmp_path / "mine.yaml", f"{MINIMAL}train: {{learning_rate: {text}}}")).train.learning_rate == number
    assert load("quickstart", [f"train.learning_rate={text}"]).train.learning_rate == number


def test_share_in_scientific_notation_is_not_a_path() -> None:
    assert load("quickstart", ["data.validation=5e-2"]).data.validation == 0.05


def test_unknown_key_suggests_the_nearest() -> None:
    assert problems("train.learning_rat=1") == ["train.learning_rat: unknown key. Did you mean 'learning_rate'?"]
    assert problems("lorra.rank=1") == ["lorra: unknown key. Did you mean 'lora'?"]
    assert problems("data.train.pth=x") == ["data.train.pth: unknown key. Did you mean 'path'?"]


def test_unknown_key_of_another_section_is_sent_there() -> None:
    assert problems("learning_rate=1") == ["learning_rate: unknown key. Did you mean 'train.learning_rate'?"]


def test_unknown_key_like_no_other_lists_what_is_known() -> None:
    assert problems("export.zzz=1") == ["export.zzz: unknown key. Known here: adapter, merged, gguf."]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.epochs=three", "train.epochs: got 'three', expected a number above 0"),
        ("train.micro_batch_size=0", "train.micro_batch_size: got 0, expected a whole number of at least 1"),
        ("train.seed=-1", "train.seed: got -1, expected a whole number from 0 to 4294967295"),
        ("train.seed=4294967296", "train.seed: got 4294967296, expected a whole number from 0 to 4294967295"),
        ("train.max_steps=1.5", "train.max_steps: got 1.5, expected a whole number of at least 1 or null"),
        ("train.compile=maybe", "train.compile: got 'maybe', expected true or false"),
        ("train.learning_rate=.inf", "train.learning_rate: got inf, expected a number above 0"),
        ("data.max_bad_rows=3", "data.max_bad_rows: got 3, expected a number from 0 to 1"),
        ("lora.dropout=1", "lora.dropout: got 1, expected a number from 0 to 0.99"),
        ("lora.dropout=0.99999", "lora.dropout: got 0.99999, expected a number from 0 to 0.99"),
        ("lora.targets=3", "lora.targets: got 3, expected default or a list [...] of text"),
        ("lora.rank_pattern=8", "lora.rank_pattern: got 8, expected a mapping of names to a whole number of at least 1"),
        ("lora.rank_pattern={q_proj: x}", "lora.rank_pattern.q_proj: got 'x', expected a whole number of at least 1"),
        (
            "lora.rank_pattern={layers.2.mixer.q_proj: 0}",
            "lora.rank_pattern.layers.2.mixer.q_proj: got 0, expected a whole number of at least 1",
        ),
        ("lora.alpha_pattern.q_proj=-1", "lora.alpha_pattern.q_proj: got -1, expected a number above 0"),
        ("lora.plus_ratio=0", "lora.plus_ratio: got 0, expected a number above 0 or null"),
        ("parallel.data=some", "parallel.data: got 'some', expected a whole number of at least 1 or auto"),
        ("export=3", "export: got 3, expected a mapping with adapter, merged, gguf"),
        ("model=null", f"model: got null, expected a mapping with {', '.join(Model.model_fields)}"),
        ("model.path=null", "model.path: got null, expected text"),
        ("evaluate.max_new_tokens=0", "evaluate.max_new_tokens: got 0, expected a whole number from 1 to 131072 or null"),
        ("evaluate.max_new_tokens=1e9", "evaluate.max_new_tokens: got 1000000000.0, expected a whole number from 1 to 131072 or null"),
        ("evaluate.max_new_tokens=long", "evaluate.max_new_tokens: got 'long', expected a whole number from 1 to 131072 or null"),
        (
            "evaluate.tasks=[chess]",
            "evaluate.tasks[0]: got 'chess', expected multiple_choice, tool_calls, span_qa, perplexity or semantic_similarity",
        ),
        (
            "data.format=glave",
            "data.format: got 'glave', expected medmcqa, fiqa, glaive, squad, chat, text or megatron. Did you mean 'glaive'?",
        ),
        *[
            (f"train.deadline={text}", f"train.deadline: got '{text}', expected hours, minutes and seconds such as '11h30m', {DATE}")
            for text in ("noon", "0h", "30m1h", "2026-13-01T10:00", "2026-05-01")
        ],
        ("train.betas=[0.9]", "train.betas[1]: missing, expected a number from 0 to below 1"),
    ],
)
def test_wrong_value_says_got_and_expected(override: str, line: str) -> None:
    assert problems(override) == [line]


def test_rows_given_as_a_mapping_are_judged_as_a_mapping() -> None:
    assert problems("data.validation={path: 3, x: 1}") == [
        "data.validation.path: got 3, expected text",
        "data.validation.x: unknown key. Known here: path, config, split.",
    ]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["data.validation=0.6", "data.test=0.5"], "data.validation + data.test: got 1.1"),
        (["train.micro_batch_size=3", "train.global_batch_size=4"], "train.global_batch_size: got 4, expected a multiple of"),
        (["method=full", "model.quantization=nf4"], "model.quantization: got 'nf4', expected none for method: full"),
        (["method=full", "model.offload=experts"], "model.offload: got 'experts', expected none for method: full"),
        (["train.eval_every=5", "data.validation=null"], "train.eval_every: needs data.validation"),
    ],
)
def test_sections_that_contradict_are_told(overrides: list[str], part: str) -> None:
    assert part in "\n".join(problems(*overrides))


def test_all_problems_are_raised_at_once() -> None:
    found = problems("train.learning_rat=1", "train.epochs=three", "data.format=x", "nonsense", "lora.rank=[")
    assert {line.split(":")[0] for line in found} == {"train.learning_rat", "train.epochs", "data.format", "override 'nonsense'"} | {
        line.split(":")[0] for line in found if line.startswith("override 'lora.rank=['")
    }
    assert len(found) == 5


def test_missing_keys_are_named(tmp_path: Path) -> None:
    assert problems(name=written(tmp_path / "mine.yaml", "name: mine\nmodel: {}\n")) == [
        "model.path: missing, expected text",
        f"data: missing, expected a mapping with {', '.join(Data.model_fields)}",
    ]


def test_duplicate_key_is_an_error_with_its_line(tmp_path: Path) -> None:
    [line] = problems(name=written(tmp_path / "mine.yaml", f"{MINIMAL}model: {{path: other/model}}\n"))
    assert line == f"{tmp_path / 'mine.yaml'}, line 5, column 1: the key 'model' stands twice"


def test_yaml_that_does_not_parse_names_file_and_line(tmp_path: Path) -> None:
    [line] = problems(name=written(tmp_path / "mine.yaml", "name: mine\nmodel: {path: [}\n"))
    assert line.startswith(f"{tmp_path / 'mine.yaml'}, line 2, column ")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words"])
def test_file_without_a_mapping_is_told(tmp_path: Path, text: str) -> None:
    assert "expected a mapping" in problems(name=written(tmp_path / "mine.yaml", text))[0]


def test_binary_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00name")
    assert "not text in UTF-8" in problems(name=str(tmp_path / "mine.yaml"))[0]


def test_unknown_name_suggests_a_built_in_and_a_path() -> None:
    assert problems(name="quikstart") == [
        "recipe: no built-in recipe 'quikstart'. Did you mean 'quickstart'? A path to a YAML file works too."
    ]
    assert "Built in: quickstart, " in problems(name="zzz")[0]


def test_override_in_the_place_of_the_recipe_is_told() -> None:
    assert problems(name="train.epochs=2")[0].endswith("such as: quickstart train.epochs=2")


def test_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none.yaml"), "none.yaml", "some/where", str(tmp_path)):
        with pytest.raises(MissingFileError) as caught:
            load(name)
        assert isinstance(caught.value, NemotuneError) and isinstance(caught.value, FileNotFoundError)


def test_schema_accepts_the_short_form_of_rows() -> None:
    forms = json_schema()["$defs"]["Data"]["properties"]["train"]["anyOf"]
    assert {"type": "string"} in forms and json_schema()["additionalProperties"] is False
    assert json.loads(json.dumps(json_schema())) == json_schema()
