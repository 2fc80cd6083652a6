"""The stage `data index`: what it says, and that a dry run and a prefix that is taken write nothing."""

from __future__ import annotations

import pytest
from rich.console import Console

from nemotune.data.megatron.indexed import IndexedDataset
from nemotune.errors import ConflictError, MissingFileError
from nemotune.workflow.indexing import index


@pytest.fixture
def call(tmp_path, capsys):
    """Index the two texts of rows.txt into `tmp_path`/out; returns the lines that were printed."""
    (tmp_path / "rows.txt").write_text("One.\n\nTwo of them.\n")

    def with_options(**changed):
        options = {"tokenizer": "nemotron-tiny", "output": tmp_path / "out", "text_key": None, "bos": False, "eos": True, "workers": None}
        index([str(tmp_path / "rows.txt")], **options | {"overwrite": False, "dry_run": False, "console": Console(width=300)} | changed)
        return capsys.readouterr().out.splitlines()

    return with_options


def test_it_ends_with_what_was_written_and_what_to_type_next(call, tmp_path):
    counted, last = call(output=tmp_path / "out.idx")  # either of the files stands for the prefix
    assert counted.startswith("2 documents, ") and counted.endswith(f", uint16, in {tmp_path}/out.bin and {tmp_path}/out.idx")
    assert last == f"wrote {tmp_path}/out.idx   next: nemotune data pretrain-nano-30b model.path=nemotron-tiny data.train={tmp_path}/out"
    assert IndexedDataset(tmp_path / "out").num_documents == 2


def test_a_dry_run_counts_and_writes_nothing(call, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert call(dry_run=True) == [f"would tokenise 2 rows of {tmp_path}/rows.txt into {tmp_path}/out.bin and {tmp_path}/out.idx (uint16)"]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_prefix_that_is_taken_is_refused_before_anything_is_read(call, tmp_path, dry_run):
    call()
    with pytest.raises(ConflictError, match=r"out\.bin: already exists; name another prefix or pass --overwrite"):
        call(tokenizer="no-such-directory", dry_run=dry_run)
    assert len(call(overwrite=True)) == 2
    with pytest.raises(MissingFileError):
        call(tokenizer="./no-such-directory", overwrite=True)
