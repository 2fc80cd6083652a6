"""What was written is read back, and a pair of files that does not agree with itself is refused by name. Megatron's own reader and writer are in
tests/parity/test_megatron_data.py."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_blend import make_dataset

from nemotune.data.megatron.indexed import DTYPES, HEADER, IndexedDataset
from nemotune.data.megatron.writer import indexed_writer, token_dtype
from nemotune.errors import ConflictError, DataError, DiskFullError, MissingFileError

LENGTHS = [4, 0, 7, 1, 12]


@pytest.fixture
def prefix(tmp_path) -> Path:
    make_dataset(tmp_path / "books", LENGTHS)
    return tmp_path / "books"


def patched(prefix: Path, at: int, value: bytes) -> None:
    """Overwrite bytes of the index."""
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    content[at : at + len(value)] = value
    Path(f"{prefix}.idx").write_bytes(content)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_documents_of_every_dtype_are_read_as_written(tmp_path, dtype):
    written = [[1, 2, 3], [], [100, 5]]
    with indexed_writer(tmp_path / "a", dtype) as writer:
        for document in written:
            writer.add(document)
        writer.add([7], [8, 9])
    found = IndexedDataset(tmp_path / "a")
    assert found.dtype == dtype and (found.num_documents, found.num_tokens) == (4, 8)
    assert [sequence.tolist() for sequence in found] == [*written, [7], [8, 9]]
    assert found.documents.tolist() == [0, 1, 2, 3, 5]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12), st.data())
def test_borders_of_any_range_are_the_documents_in_it(tmp_path_factory, lengths, data):
    found = make_dataset(tmp_path_factory.mktemp("d") / "a", lengths)
    starts = (np.cumsum(lengths) - lengths).tolist()
    begin = data.draw(st.integers(0, sum(lengths)))
    end = data.draw(st.integers(begin, sum(lengths)))
    inside = [start for start in starts if begin <= start < end]
    assert found.starts(begin, end).tolist() == inside and found.count(begin, end) == len(inside)
    assert found.border(begin) == min((start for start in starts if start >= begin), default=sum(lengths))


def test_a_document_of_several_sequences_begins_with_the_first(tmp_path):
    with indexed_writer(tmp_path / "a", "int32") as writer:
        writer.add([1, 2], [3])
        writer.add([4], [5, 6])
    assert IndexedDataset(tmp_path / "a").starts(0, 6).tolist() == [0, 3]


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"MMIDIDY", "begins with .*no index of Megatron's"),
        (9, struct.pack("<Q", 2), "has version 2, expected 1"),
        (17, b"\x09", r"has dtype code 9, expected 1 \(uint8\).* 8 \(uint16\)"),
        (17, b"\x04", "sequence 1 has 0 tokens from byte 8, expected 0 or more from byte 16|has 48 bytes, expected 72 by its .idx"),
        (18, struct.pack("<Q", 6), "has 142 bytes, expected 154 by its header"),
        (18, struct.pack("<Q", 2**63), "expected 110,680,464,442,257,309,"),
        (26, struct.pack("<Q", 0), "expected 94 by its header"),
        (34, struct.pack("<i", 5), "sequence 1 has 0 tokens from byte 8, expected 0 or more from byte 10"),
        (34, struct.pack("<i", -4), "sequence 0 has -4 tokens"),
        (54, struct.pack("<q", 2), "sequence 0 has 4 tokens from byte 2, expected 0 or more from byte 0"),
        (94, struct.pack("<q", 1), "its documents span sequences 1 to 5, expected 0 to 5"),
        (102, struct.pack("<q", 4), "its documents go backwards"),
    ],
)
def test_an_index_that_lies_is_refused(prefix, at, value, message):
    patched(prefix, at, value)
    with pytest.raises(DataError, match=message):
        IndexedDataset(prefix)


@pytest.mark.parametrize("size", [0, 5, HEADER.size, 141, 143])
def test_an_index_of_another_size_is_refused(prefix, size):
    content = Path(f"{prefix}.idx").read_bytes() + b"\0"
    Path(f"{prefix}.idx").write_bytes(content[:size])
    with pytest.raises(DataError, match=r"books\.idx: .*Write the dataset anew"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("change", [-1, 2])
@pytest.mark.parametrize("verify", [True, False])
def test_a_bin_of_another_size_is_refused(prefix, change, verify):
    content = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes((content + b"\0\0")[: len(content) + change])
    with pytest.raises(DataError, match=rf"books\.bin: has {len(content) + change} bytes, expected 48 by its .idx"):
        IndexedDataset(prefix, verify=verify)


def test_multimodal_data_are_refused_as_such(prefix):
    Path(f"{prefix}.idx").write_bytes(Path(f"{prefix}.idx").read_bytes() + bytes(5))
    with pytest.raises(DataError, match="multimodal"):
        IndexedDataset(prefix)


def test_a_missing_file_is_named_with_its_neighbour(prefix):
    with pytest.raises(MissingFileError, match=r"bookz\.idx: no such file.*Did you mean .*books'"):
        IndexedDataset(f"{prefix.parent}/bookz")
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(MissingFileError, match=r"books\.bin: no such file"):
        IndexedDataset(prefix)


def test_the_digest_follows_index_and_tokens(prefix):
    before = IndexedDataset(prefix).digest()
    assert before == IndexedDataset(prefix).digest()
    Path(f"{prefix}.bin").write_bytes(bytes(48))
    tokens = IndexedDataset(prefix).digest()
    make_dataset(prefix.with_name("other"), [4, 0, 7, 2, 11])
    assert len({before, tokens, IndexedDataset(prefix.with_name("other")).digest()}) == 3


def test_files_are_whole_or_absent(prefix):
    with pytest.raises(ConflictError, match="already exists"), indexed_writer(prefix, "uint16"):
        pass
    before = Path(f"{prefix}.bin").read_bytes()
    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), DiskFullError)):
        with pytest.raises(raised), indexed_writer(prefix, "uint16", overwrite=True) as writer:
            writer.add([1, 2])
            raise error
        assert Path(f"{prefix}.bin").read_bytes() == before and IndexedDataset(prefix).num_documents == 5
        assert sorted(path.name for path in prefix.parent.iterdir()) == ["books.bin", "books.idx"]


def test_a_token_that_the_dtype_does_not_hold_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not fit into uint16"), indexed_writer(tmp_path / "a", "uint16") as writer:
        writer.add([1, 65536])
    assert list(tmp_path.iterdir()) == []
    assert token_dtype(65499) == np.uint16 and token_dtype(65500) == np.int32
