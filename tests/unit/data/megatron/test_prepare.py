"""A recipe with a blend to prepared data: what is counted, held out and refused, and what the fingerprint follows."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console
from toy_blend import make_blend, make_dataset

from nemotune.data.loader import batches
from nemotune.data.megatron.writer import indexed_writer
from nemotune.data.prepare import Prepared, prepare
from nemotune.data.preview import show
from nemotune.errors import ConflictError, DataError, RecipeError
from nemotune.evaluate import check_recipe
from nemotune.recipe import load
from nemotune.recipe.schema import Recipe


def make_recipe(train, *, packing=True, epochs=1, max_steps=None, seed=42, eval_every=None, sequence_length=64, **data) -> Recipe:
    data = {"format": "megatron", "train": str(train), "packing": packing, "sequence_length": sequence_length, **data}
    train = {"epochs": epochs, "max_steps": max_steps, "seed": seed, "eval_every": eval_every}
    return Recipe.model_validate({"name": "t", "model": {"path": "unused"}, "method": "pretrain", "data": data, "train": train})


@pytest.fixture
def vocab_size(tokenizer) -> int:
    return len(tokenizer)


@pytest.fixture
def blend(tmp_path, vocab_size):
    """Two datasets, of which the second is small, and a third that is held out."""
    for name, lengths in {"web": [30] * 100, "books": [200, 16] * 2, "held": [10, 1, 40, 90]}.items():
        make_dataset(tmp_path / name, lengths, vocab_size=vocab_size)
    return make_blend(tmp_path / "blend.json", train=[3, "web", 1, "books"], valid="held")


@pytest.fixture
def prepared_of(tmp_path, tokenizer):
    def of(recipe, name="data", **options):
        return prepare(recipe, tokenizer, out_dir=tmp_path / "run" / name, cache_dir=tmp_path / "cache", **options)

    return of


def test_stats_tell_of_each_dataset_what_the_run_reads(blend, prepared_of):
    prepared = prepared_of(make_recipe(blend, max_steps=100))
    web, books = prepared.stats["splits"]["train"]["datasets"]
    assert (web["documents"], web["tokens"], web["rows"]) == (100, 3000, 47) and (books["documents"], books["tokens"], books["rows"]) == (
        4,
        432,
        7,
    )
    assert web["share"] == pytest.approx(0.75, abs=1e-6) and web["epochs"] == pytest.approx(0.75 * 800 / 47, abs=1e-4)
    assert books["epochs"] == pytest.approx(0.25 * 800 / 7, abs=1e-3)
    assert prepared.stats["splits"]["train"] | {"datasets": 0} == {
        "documents": 104, "tokens": 3432, "rows": 54, "packs": 800, "rows_of_the_run": 800, "length": {}, "datasets": 0,
    }  # fmt: skip
    again = Prepared.load(prepared.validation.directory)
    assert again.stats == prepared.stats and again.train.to_json() == prepared.train.to_json()


def test_what_was_prepared_here_is_read_from_elsewhere(blend, tmp_path, monkeypatch, prepared_of):
    monkeypatch.chdir(tmp_path)
    here = prepared_of(make_recipe("web", validation=0.1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    there = Prepared.load(here.validation.directory)
    assert there.train[int(there.train.packs[3][0])].tokens.size


@pytest.mark.parametrize(
    ("settings", "packs", "rows"),
    [({}, 56, 56), ({"epochs": 2.5}, 56, 144), ({"max_steps": 3}, 56, 24), ({"epochs": 2, "max_steps": 30}, 120, 240)],
)
def test_a_run_is_so_many_epochs_of_the_blend_or_so_many_steps(blend, prepared_of, settings, packs, rows):
    """54 rows of both datasets are 7 steps of 8; where more steps are asked for, the blend goes on."""
    train = prepared_of(make_recipe(blend, **settings)).stats["splits"]["train"]
    assert (train["packs"], train["rows_of_the_run"]) == (packs, rows)


def test_without_weights_a_dataset_counts_by_its_size(tmp_path, blend, prepared_of):
    path = make_blend(tmp_path / "plain.json", train="web books")
    shares = [found["share"] for found in prepared_of(make_recipe(path)).stats["splits"]["train"]["datasets"]]
    assert shares == pytest.approx([47 / 54, 7 / 54], abs=1e-6)


@pytest.mark.parametrize("packing", [True, "concatenated"])
def test_held_out_documents_are_read_once_and_all_of_them(blend, prepared_of, packing):
    prepared = prepared_of(make_recipe(blend, packing=packing))
    documents = [prepared.validation[index].tokens for index in range(len(prepared.validation))]
    sizes = [10, 40, 45, 45] if packing is True else [64, 64, 13]  # the document of one token has nothing to learn; 90 are two of 45
    assert [len(tokens) for tokens in documents] == sizes and sum(
        batch.num_tokens for batch in batches(prepared.validation, max_tokens=64)
    ) == sum(sizes)
    assert prepared.test is None
    source = prepared.stats["sources"]["validation"]
    assert (source["rows"], source["bad"]) == ((4, 1) if packing is True else (3, 0))
    examples = list(prepared.validation.examples())
    assert [example.meta["row"] for example in examples] == ([0, 2, 3] if packing is True else [0, 1, 2])


def test_shares_are_the_last_documents_of_each_dataset(blend, tmp_path, prepared_of):
    prepared = prepared_of(make_recipe(blend, validation=0.1, test=0.05))
    [web, books] = prepared.train.parts
    assert (web.begin, web.end) == (0, 2550)  # 3000 - 150 - 300
    assert books.end == 416  # where the first documents from tokens 410 and 373 on begin: one to test, none to validate
    assert [len(prepared.test[index].tokens) for index in range(5)] == [30] * 5
    groups = [example.meta["group"] for example in prepared.test.examples()]
    assert groups == ["web"] * 5 + ["books"]


def test_the_fingerprint_follows_content_and_settings_alone(blend, tmp_path, vocab_size, prepared_of):
    def fingerprint(path=blend, **changed):
        return prepared_of(make_recipe(path, **changed), name="other", overwrite=True).fingerprint

    one = fingerprint()
    assert one == fingerprint(max_steps=1000) == fingerprint(epochs=3)
    (tmp_path / "moved").mkdir()
    for path in [*tmp_path.glob("*.bin"), *tmp_path.glob("*.idx"), blend]:
        (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
    assert fingerprint(tmp_path / "moved" / "blend.json") == one
    changed = [
        fingerprint(packing="concatenated"), fingerprint(seed=1), fingerprint(sequence_length=32), fingerprint(validation=0.1),
        fingerprint(make_blend(tmp_path / "b.json", train="2 web 1 books", valid="held")),
        fingerprint(make_blend(tmp_path / "b.json", train="3 web 1 books")),
    ]  # fmt: skip
    for part in ("web.bin", "web.idx"):
        (tmp_path / part).unlink()
    make_dataset(tmp_path / "web", [29, 31] + [30] * 98, vocab_size=vocab_size)
    changed.append(fingerprint())
    assert len({one, *changed}) == len(changed) + 1


def test_prepared_again_the_run_may_be_longer_but_no_other(blend, prepared_of):
    prepared_of(make_recipe(blend))
    assert prepared_of(make_recipe(blend, max_steps=99)).stats["splits"]["train"]["rows_of_the_run"] == 792
    with pytest.raises(ConflictError, match="prepared with other data.sequence_length"):
        prepared_of(make_recipe(blend, sequence_length=32))
    with pytest.raises(ConflictError, match="train.seed"):
        prepared_of(make_recipe(blend, seed=1))


@pytest.mark.parametrize(
    ("train", "settings", "message"),
    [
        ("web", {"eval_every": 5}, "train.eval_every: needs data.validation"),
        ("empty", {}, "empty has 0 tokens to train on"),
        ("ones", {}, "ones has 30 tokens to train on, none after another in a document"),
        ("web", {"validation": 0.001}, "data.validation: no document is left in it"),
        ("web", {"validation": "ones"}, "data.validation: none of its 30 documents has two tokens or more"),
        ("floats", {}, "floats.idx: holds float32, expected whole numbers"),
        ("foreign", {}, "foreign: got the token ids 3 to 8194, expected 0 to"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_anything_is_written(
    tmp_path, vocab_size, blend, prepared_of, train, settings, message
):
    make_dataset(tmp_path / "empty", [])
    make_dataset(tmp_path / "ones", [1] * 30, vocab_size=vocab_size)
    make_dataset(tmp_path / "foreign", [9000], vocab_size=10000)
    with indexed_writer(tmp_path / "floats", "f4") as writer:
        writer.add([1.5, 2.0])
    settings = {key: str(tmp_path / value) if isinstance(value, str) else value for key, value in settings.items()}
    with pytest.raises((DataError, RecipeError), match=message):
        prepared_of(make_recipe(tmp_path / train, **settings))
    assert not (tmp_path / "run" / "data").exists()


def test_concatenated_documents_of_one_token_can_be_trained_on(tmp_path, vocab_size, prepared_of):
    make_dataset(tmp_path / "ones", [1] * 30, vocab_size=vocab_size)
    assert prepared_of(make_recipe(tmp_path / "ones", packing="concatenated")).stats["splits"]["train"]["rows"] == 1


def test_mock_needs_no_files_and_knows_its_tokenizer(prepared_of, vocab_size):
    prepared = prepared_of(make_recipe("mock", max_steps=4, validation=0.0001))
    tokens = np.concatenate([prepared.train[int(document)].tokens for row in range(20) for document in prepared.train.packs[row]])
    assert tokens.max() < vocab_size and len(prepared.validation)
    assert prepared.stats["splits"]["train"]["rows_of_the_run"] == 32


def test_the_preview_shows_datasets_and_documents(blend, prepared_of, tokenizer, capsys):
    show(prepared_of(make_recipe(blend)), tokenizer, Console(width=200), samples=2)
    shown = capsys.readouterr().out
    assert all(
        word in shown for word in ("web", "books", "75.00%", "validation: 4 documents, 140 tokens", "1 x no supervised token: row 1")
    )
    assert shown.count("⟦") == 2 + shown.count("⟦like this⟧") == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.packing=false"], "data.packing: got false, expected true .documents apart. or concatenated"),
        (["data.max_samples=5"], "data.max_samples: expected null"),
        (["data.train=mock"], "train.max_steps: expected a number of steps for data.train: mock"),
        (["data.format=text", "data.packing=concatenated"], "data.packing: got 'concatenated', expected true or false"),
    ],
)
def test_a_recipe_that_files_of_tokens_cannot_follow_is_refused(tmp_path, settings, message):
    path = tmp_path / "r.yaml"
    path.write_text("name: t\nmodel: {path: m}\nmethod: pretrain\ndata: {format: megatron, train: web}\n")
    load(str(path))
    with pytest.raises(RecipeError, match=message):
        load(str(path), settings)


def test_tasks_without_held_out_documents_are_refused_from_the_blend_file_alone(tmp_path):
    path = make_blend(tmp_path / "blend.json", train="web")
    with pytest.raises(RecipeError, match="no held-out rows to ask"):
        check_recipe(make_recipe(path))
    path.write_text(json.dumps({"train": "web", "test": "held"}))
    check_recipe(make_recipe(path))
