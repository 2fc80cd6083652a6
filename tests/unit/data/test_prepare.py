"""From rows to prepared data: nothing lost without a reason, nothing half written, the same content never prepared twice."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
import toy_chat

from nemotune.data import documents, tokenise
from nemotune.data import prepare as prepare_module
from nemotune.data.cache import default_cache_dir
from nemotune.data.loader import Loader
from nemotune.data.prepare import Prepared, prepare
from nemotune.data.rejects import read_rejected
from nemotune.data.split import Split
from nemotune.errors import ConflictError, DataError, DiskFullError, MissingFileError, NemotuneError


def rows(count=40, words=1):
    return [
        {"messages": [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": "how are you? " * words + str(i)}]}
        for i in range(count)
    ]


@pytest.fixture
def run(tokenizer, make_recipe, tmp_path):
    """Prepare `data` settings into `out`, with the cache beside it."""

    def run(out="data", *, seed=42, num_workers=None, overwrite=False, with_tokenizer=tokenizer, **data):
        recipe = make_recipe(seed, **{"format": "chat", "sequence_length": 128, **data})
        places = {"out_dir": tmp_path / out, "cache_dir": tmp_path / "cache"}
        return prepare(recipe, with_tokenizer, **places, num_workers=num_workers, overwrite=overwrite)

    return run


def files(directory):
    return sorted(file.name for file in directory.iterdir()) if directory.exists() else []


def documents_of(split):
    return [(split[i].tokens.tolist(), split[i].mask.tolist(), split[i].row) for i in range(len(split))]


def test_prepared_data_hold_every_row_once(run, write_rows, tokenizer, tmp_path):
    prepared = run(train=write_rows(rows()), validation=0.1, test=0.2)
    splits = [prepared.train, prepared.validation, prepared.test]
    assert [len(split) for split in splits] == [28, 4, 8]
    examples = [example for split in splits for example in split.examples()]
    assert sorted(example.meta["row"] for example in examples) == list(range(40))
    for split in splits:
        assert [example.meta["row"] for example in split.examples()] == [split[i].row for i in range(len(split))]
        assert sorted(np.concatenate(split.packs).tolist()) == list(range(len(split)))
    first = next(prepared.train.examples())
    assert first.messages[0]["content"] in tokenizer.decode(prepared.train[0].tokens)
    names = [f"{name}.{kind}" for name in ("test", "train", "validation") for kind in ("documents.arrow", "jsonl", "packs.arrow")]
    assert files(tmp_path / "data") == sorted(["rejected.jsonl", "stats.json", *names])


def test_stats_count_what_was_written(run, write_rows):
    prepared = run(train=write_rows(rows()))
    train = prepared.train
    stats = prepared.stats["splits"]["train"]
    lengths = [len(train[i].tokens) for i in range(len(train))]
    assert stats["rows"] == stats["documents"] == 40
    assert stats["tokens"] == sum(lengths)
    assert stats["mask_share"] == sum(train[i].mask.sum() for i in range(40)) / sum(lengths)
    assert stats["fill_rate"] == sum(lengths) / (len(train.packs) * 128) > 0.8
    assert (stats["length"]["min"], stats["length"]["max"]) == (min(lengths), max(lengths))
    assert sum(entry["documents"] for entry in stats["length"]["histogram"]) == 40
    assert prepared.validation is None and prepared.test is None
    assert Prepared.load(train.directory).stats == prepared.stats


def test_second_run_takes_the_first_ones_files_from_the_cache(run, write_rows, tmp_path, monkeypatch):
    path = write_rows(rows())
    first = run(train=path, validation=0.1)
    monkeypatch.setattr(prepare_module, "_write_splits", lambda *args: pytest.fail("prepared again"))
    second = run("other", train=path, validation=0.1)
    assert second.fingerprint == first.fingerprint and second.stats == first.stats
    for name in files(tmp_path / "data"):
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert run(train=path, validation=0.1).fingerprint == first.fingerprint, "into the same directory again"
    assert files(tmp_path / "cache") == [first.fingerprint]


def test_fingerprint_changes_with_rows_template_tokenizer_and_settings_only(run, write_rows, tokenizer):
    path = write_rows(rows())
    base = run("a", train=path).fingerprint
    assert run("b", train=write_rows(rows(), "elsewhere.jsonl")).fingerprint == base, "where the rows lie does not matter"
    others = [
        run("c", train=write_rows(rows(39), "fewer.jsonl")),
        run("d", train=write_rows(rows()[::-1], "reversed.jsonl")),
        run("e", train=path, sequence_length=64),
        run("f", train=path, packing=False),
        run("g", train=path, template="chatml"),
        run("h", train=path, thinking=False, train_on="all"),
        run("i", train=path, validation=0.1),
        run("j", train=path, seed=1),
    ]
    tokenizer.chat_template = toy_chat.PLAIN + "{# another #}"
    others.append(run("k", train=path))
    larger = toy_chat.toy_tokenizer()
    larger.chat_template = toy_chat.PLAIN
    larger.add_tokens(["are you"])
    others.append(run("l", train=path, with_tokenizer=larger))
    fingerprints = [base, *(other.fingerprint for other in others)]
    assert len(set(fingerprints)) == len(fingerprints)


def test_data_of_another_fingerprint_are_not_overwritten_unasked(run, write_rows, tmp_path):
    path = write_rows(rows())
    first = run(train=path)
    with pytest.raises(ConflictError, match=r"data prepared with other data\.sequence_length; choose another run name or pass --overwrite"):
        run(train=path, sequence_length=64)
    with pytest.raises(ConflictError, match="other the rows, the template or the tokenizer"):
        run(train=write_rows(rows(39), "fewer.jsonl"))
    assert Prepared.load(tmp_path / "data").stats == first.stats
    assert run(train=path, sequence_length=64, overwrite=True).fingerprint != first.fingerprint


BAD = [{"messages": [{"role": "user", "content": "Hello"}]}, {"messages": [{"role": "assistant", "content": "<|im_end|>"}]}, {"text": "x"}]


def test_bad_rows_are_counted_by_reason_with_their_numbers(run, write_rows, tmp_path):
    prepared = run(train=write_rows([*rows(3), *BAD, *rows(3), BAD[0]]), max_bad_rows=0.5)
    assert prepared.stats["sources"]["train"]["rows"] == 10
    assert prepared.stats["sources"]["train"]["rejected"] == {
        "no assistant turn": {"count": 2, "rows": [3, 9]},
        "no messages": {"count": 1, "rows": [5]},
        "a message holds a token of the template": {"count": 1, "rows": [4]},
    }
    rejected = read_rejected(tmp_path / "data" / "rejected.jsonl")
    assert sorted((line["row"], line["reason"]) for line in rejected) == [
        (3, "no assistant turn"), (4, "a message holds a token of the template"), (5, "no messages"), (9, "no assistant turn"),
    ]  # fmt: skip
    assert len(prepared.train) == 6


@pytest.mark.parametrize("bad", [BAD[0], BAD[1]], ids=["by its format", "by its template"])
def test_too_many_bad_rows_stop_the_run_and_leave_nothing(run, write_rows, tmp_path, bad):
    path = write_rows([*rows(30), bad, bad])
    with pytest.raises(
        DataError, match=r"(?s)data\.max_bad_rows: 2 of 32 rows of data\.train \(6\.2%\).*2 x .*: row 30.*, 31\nMend the rows"
    ):
        run(train=path)
    assert files(tmp_path) == ["cache", "rows.jsonl"] and files(tmp_path / "cache") == []
    assert len(run(train=path, max_bad_rows=0.07).train) == 30


def test_mended_rows_are_counted(run, write_rows):
    calls = [f"""<functioncall> {{"name": "f", "arguments": {a}}}""" for a in ("'{}'", "{}", "{}")]
    system = 'SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n{"name": "f"}'
    glaive = [{"system": system, "chat": f"USER: Go {i}\n\n\nASSISTANT: {call} <|endoftext|>"} for i, call in enumerate(calls)]
    assert run(train=write_rows(glaive), format="glaive").stats["sources"]["train"]["repaired"] == {"arguments without their quotes": 2}


@pytest.mark.parametrize(("overflow", "left"), [("drop", 3), ("truncate", 4)])
def test_rows_over_the_limit_follow_overflow_and_are_counted(run, write_rows, tmp_path, overflow, left):
    prepared = run(train=write_rows([*rows(2), *rows(1, words=90), *rows(1)]), overflow=overflow)
    stats = prepared.stats["splits"]["train"]
    assert len(prepared.train) == left == stats["rows"]
    assert (stats["dropped"], stats["truncated"]) == (4 - left, left - 3)
    assert stats["length"]["longest_seen"] > 128 >= stats["length"]["max"]
    assert [line["row"] for line in read_rejected(tmp_path / "data" / "rejected.jsonl")] == ([2] if overflow == "drop" else [])
    assert prepared.stats["sources"]["train"]["bad"] == 0


def test_long_text_is_split_and_no_token_of_it_is_lost(run, write_rows):
    text = "how are you? " * 90
    whole = run(out="whole", train=write_rows([{"text": text}]), format="text", template="none", sequence_length=4096).train
    split = run(train=write_rows([{"text": text}]), format="text", template="none", overflow="split").train
    assert len(split) > 1 and len(split[0].tokens) <= 128
    assert np.concatenate([split[i].tokens for i in range(len(split))]).tolist() == whole[0].tokens.tolist()
    assert {split[i].row for i in range(len(split))} == {0} and len(list(split.examples())) == 1


def test_conversations_cannot_be_split(make_recipe):
    with pytest.raises(ValueError, match="an answer would lose its question"):
        make_recipe(42, format="chat", train="rows.jsonl", overflow="split")


def test_overflow_error_names_the_row(run, write_rows):
    with pytest.raises(DataError, match=r"data\.overflow: error; row 2 of train has \d+ tokens, expected at most 128"):
        run(train=write_rows([*rows(2), *rows(1, words=90)]), overflow="error")


def test_document_whose_answer_was_cut_off_is_rejected(run, write_rows):
    long_question = {"messages": [{"role": "user", "content": "Hello " * 200}, {"role": "assistant", "content": "Yes."}]}
    prepared = run(train=write_rows([*rows(3), long_question]), overflow="truncate", max_bad_rows=0.3)
    assert prepared.stats["sources"]["train"]["rejected"] == {"no supervised token": {"count": 1, "rows": [3]}}
    assert len(prepared.train) == 3


def test_nothing_left_is_an_error(run, write_rows):
    with pytest.raises(DataError, match=r"no document is left in the train split \(3 x longer than data\.sequence_length\)"):
        run(train=write_rows(rows(3)), sequence_length=4)
    with pytest.raises(DataError, match=r"\(3 x no supervised token\)"):
        run(train=write_rows(rows(3)), sequence_length=1, overflow="truncate", train_on="all", max_bad_rows=1)
    with pytest.raises(DataError, match="has no rows"):
        run(train=write_rows([]))


def test_held_out_rows_of_their_own_stay_whole_and_overlap_is_told(run, write_rows):
    held = write_rows(rows(45)[38:], "held.jsonl")
    prepared = run(train=write_rows(rows()), test=held)
    assert len(prepared.train) == 40 and len(prepared.test) == 7
    assert prepared.stats["in_train_too"] == {"test": 2}


def test_a_held_out_row_that_is_validated_on_is_not_counted_as_trained_on(run, write_rows):
    shared = run("first", train=write_rows(rows()), validation=0.2)
    validated = [example.meta["row"] for example in shared.validation.examples()]
    trained = [example.meta["row"] for example in shared.train.examples()]
    held = write_rows([rows()[number] for number in (*validated, trained[0])], "held.jsonl")
    prepared = run(train=write_rows(rows()), validation=0.2, test=held)
    assert len(validated) == 8 and prepared.stats["in_train_too"] == {"test": 1}
    assert prepared.stats["in_validation_too"] == 8


def test_rows_of_a_validation_file_that_are_tested_too_are_told(run, write_rows):
    sources = {"validation": write_rows(rows(45)[40:], "validation.jsonl"), "test": write_rows(rows(50)[43:], "test.jsonl")}
    stats = run(train=write_rows(rows()), **sources).stats
    assert stats["in_validation_too"] == 2 and stats["in_train_too"] == {"validation": 0, "test": 0}
    assert run("shares", train=write_rows(rows()), validation=0.1, test=0.1).stats["in_validation_too"] == 0


def test_max_samples_bounds_the_training_rows_only(run, write_rows):
    prepared = run(train=write_rows(rows()), test=write_rows(rows(20), "held.jsonl"), max_samples=10)
    assert (len(prepared.train), len(prepared.test)) == (10, 20)


def test_without_packing_each_document_is_a_row(run, write_rows):
    prepared = run(train=write_rows(rows(5)), packing=False)
    assert [pack.tolist() for pack in prepared.train.packs] == [[0], [1], [2], [3], [4]]


def test_rewritten_history_gives_a_document_for_each_turn_of_a_row(run, write_rows):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi", "reasoning_content": "polite"}] * 2
    prepared = run(train=write_rows([{"messages": turns}, *rows(1)]))
    assert [prepared.train[i].row for i in range(3)] == [0, 0, 1]
    assert prepared.stats["splits"]["train"]["rows"] == 2


@pytest.mark.slow
def test_processes_give_what_one_gives(run, write_rows, monkeypatch):
    monkeypatch.setattr(tokenise, "CHUNK_ROWS", 8)
    path = write_rows(rows(200))
    one, two = run("one", train=path, num_workers=1), run("two", train=path, num_workers=2, max_bad_rows=0.06)
    assert one.fingerprint != two.fingerprint, "or the second came from the cache"
    assert documents_of(one.train) == documents_of(two.train)
    assert [pack.tolist() for pack in one.train.packs] == [pack.tolist() for pack in two.train.packs]


@pytest.mark.parametrize("stage", ["_rows", "_documents"])
def test_full_disk_is_readable_and_leaves_nothing(run, write_rows, tmp_path, monkeypatch, stage):
    def no_space(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(documents.SplitWriter):
        def add(self, found, rejects):
            monkeypatch.setattr(getattr(self, stage), "write" if stage == "_rows" else "append", no_space, raising=False)
            super().add(found, rejects)

    monkeypatch.setattr(prepare_module, "SplitWriter", Full)
    with pytest.raises(DiskFullError, match="the disk is full; nothing was left behind"):
        run(train=write_rows(rows()))
    assert files(tmp_path) == ["cache", "rows.jsonl"] and files(tmp_path / "cache") == []


def test_errors_leave_what_was_there(run, write_rows, tmp_path):
    first = run(train=write_rows(rows()))
    for change in ({"train": str(tmp_path / "row.jsonl")}, {"train": write_rows([{"a": 1}], "bad.jsonl")}, {"sequence_length": 4}):
        with pytest.raises(NemotuneError):
            run(**{"train": write_rows(rows()), **change}, overwrite=True)
    assert documents_of(Prepared.load(tmp_path / "data").train) == documents_of(first.train)
    assert files(tmp_path / "cache") == [first.fingerprint]


def test_unreadable_shard_names_the_file(run, write_rows, tmp_path):
    run(train=write_rows(rows()))
    shard = tmp_path / "data" / "train.documents.arrow"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match=r"train\.documents\.arrow: unreadable .*prepare it again"):
        Prepared.load(tmp_path / "data")
    with pytest.raises(MissingFileError, match="run `nemotune data` first"):
        Prepared.load(tmp_path / "nowhere")


def test_loader_reads_prepared_packs_across_record_batches(run, write_rows, monkeypatch):
    from nemotune.data import split as split_module

    monkeypatch.setattr(split_module, "BATCH_ROWS", 3)
    prepared = run(train=write_rows(rows(41)))
    batch = Loader(prepared.train, global_batch_size=len(prepared.train.packs), micro_batch_size=len(prepared.train.packs), seed=0).step(0)[
        0
    ]
    order = batch.document_ids.tolist()
    assert sorted(order) == list(range(41))
    assert [prepared.train[i].row for i in range(41)] == list(range(41))
    assert batch.tokens_T.tolist() == [token for i in order for token in prepared.train[i].tokens.tolist()]
    with pytest.raises(IndexError):
        prepared.train[41]


def test_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("NEMOTUNE_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path / "data"
    monkeypatch.delenv("NEMOTUNE_CACHE")
    assert default_cache_dir().parts[-3:] == (".cache", "nemotune", "data")


def test_stats_file_is_what_prepared_holds(run, write_rows, tmp_path):
    prepared = run(train=write_rows(rows()))
    assert json.loads((tmp_path / "data" / "stats.json").read_text(encoding="utf-8")) == prepared.stats
    assert isinstance(prepared.train, Split)
