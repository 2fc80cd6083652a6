"""Every kind of file gives the same rows, one at a time; what is missing or broken is named."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemotune import assets
from nemotune.data import readers
from nemotune.data.sources import iter_rows
from nemotune.errors import DataError, MissingFileError
from nemotune.recipe.schema import Source

ROWS = [{"question": f"Is {i} odd?", "answer": "naïve\nline"} for i in range(50)]


def read(path, **kwargs):
    return list(iter_rows(Source(path=str(path), **kwargs)))


def write_arrow(path, rows, *, stream):
    table = pa.Table.from_pylist(rows)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


WRITERS = {
    "rows.jsonl": lambda path: path.write_text("\n\n".join(map(json.dumps, ROWS)), encoding="utf-8"),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8"),
    "lines.json": lambda path: path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8-sig"),
    "rows.csv": lambda path: write_csv(path, ROWS),
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7),
    "file.arrow": lambda path: write_arrow(path, ROWS, stream=False),
    "stream.arrow": lambda path: write_arrow(path, ROWS, stream=True),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("chunk", [16, 1 << 20])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, monkeypatch, name, chunk):
    monkeypatch.setattr(readers, "CHUNK", chunk)
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == ROWS


def test_rows_come_one_at_a_time(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{broken', encoding="utf-8")
    rows = iter_rows(Source(path=str(path)))
    assert next(rows) == {"a": 1}
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2"):
        next(rows)


def test_text_file_gives_a_document_per_block(tmp_path):
    (tmp_path / "a.txt").write_text("\n one\ntwo\n \n\nthree\n", encoding="utf-8")
    assert read(tmp_path / "a.txt") == [{"text": " one\ntwo"}, {"text": "three"}]


def test_directory_gives_its_files_in_order_and_by_split(tmp_path):
    for name, value in (("train-00001.jsonl", 2), ("train-00000.jsonl", 1), ("validation.jsonl", 3), ("trainer.jsonl", 4)):
        (tmp_path / name).write_text(json.dumps({"a": value}), encoding="utf-8")
    (tmp_path / ".hidden.jsonl").write_text("broken", encoding="utf-8")
    assert [row["a"] for row in read(tmp_path, split="train")] == [1, 2]
    assert [row["a"] for row in read(tmp_path, split="validation")] == [3]
    assert len(read(tmp_path)) == 4
    with pytest.raises(MissingFileError, match="no data file of split 'test'"):
        read(tmp_path, split="test")


def test_directory_of_two_kinds_is_ambiguous(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}', encoding="utf-8")
    (tmp_path / "LICENSE.txt").write_text("free", encoding="utf-8")
    with pytest.raises(DataError, match=r"\.jsonl and \.txt"):
        read(tmp_path)


def test_nested_nulls_of_arrow_are_keys_that_the_row_never_had(tmp_path):
    rows = [{"m": [{"role": "a", "x": None}], "exp": None}, {"m": [{"role": "b", "x": {"y": 1}}], "exp": "e"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [{"m": [{"role": "a"}], "exp": None}, rows[1]]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2: got list"),
        ("a.json", '[{"a": 1},\n{"a": 1]', "line 2: Expecting ',' delimiter"),
        ("a.json", '[{"a": 1},\n{"a": "x', "line 2: the file ends inside the array"),
        ("a.json", '[{"a": 1},\n', "line 2: the file ends inside the array"),
        ("a.csv", "a,b\n1,2\n3\n", "line 3: expected 2 columns"),
        ("a.csv", "a,b\n1,2,3\n", "line 2: expected 2 columns"),
        ("a.parquet", "no parquet", "unreadable"),
        ("a.arrow", "no arrow at all", "unreadable"),
        ("a.xyz", "", r"got a '\.xyz' file, expected one of \.jsonl"),
    ],
)
def test_unreadable_file_is_named_with_its_line(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"(?s){name}.*{expected}"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.parquet", "file.arrow", "stream.arrow"])
def test_cut_off_shard_is_named(tmp_path, name):
    WRITERS[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"{name}.*unreadable"):
        read(tmp_path / name)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DataError, match=r"a\.jsonl: not UTF-8"):
        read(tmp_path / "a.jsonl")


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(MissingFileError, match=r"Did you mean 'rows\.jsonl'"):
        read(tmp_path / "row.jsonl")


def test_builtin_paths_lie_in_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "files", lambda package: tmp_path)
    (tmp_path / "nemotron-tiny").mkdir()
    (tmp_path / "nemotron-tiny" / "rows.jsonl").write_text('{"a": 1}', encoding="utf-8")
    assert read("nemotron-tiny/rows.jsonl") == [{"a": 1}]
    with pytest.raises(MissingFileError, match="no such file"):
        read("nemotron-tiny/missing")
    assert assets.resolve("./nemotron-tiny") is assets.resolve("nemotron-tinytown/x") is None


def test_hub_id_streams_through_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return iter([{"a": 1, "b": [{"c": None}]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("someone/rows", config="main") == [{"a": 1, "b": [{}]}]
    assert asked == [(("someone/rows", "main"), {"split": "train", "streaming": True})]


def test_unreachable_hub_set_is_a_missing_file(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(MissingFileError, match=r"someone/rows: neither a file here nor readable .*no network.*local path"):
        read("someone/rows")
