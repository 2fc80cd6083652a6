"""Megatron's own code is the oracle for its files: what either writes the other reads, token for token and byte for byte; and its blends are read as it does."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from nemotune.data.megatron.blend import parse_blend
from nemotune.data.megatron.indexed import DTYPES, IndexedDataset
from nemotune.data.megatron.stream import Turns
from nemotune.data.megatron.writer import CODES, indexed_writer, token_dtype

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")
LENGTHS = [5, 1, 0, 300, 17]


@pytest.fixture(scope="module")
def theirs():
    """Imported on use: it takes seconds."""
    return importlib.import_module("megatron.core.datasets.indexed_dataset")


def documents(dtype: np.dtype) -> list[np.ndarray]:
    random, top = np.random.RandomState(0), 127 if dtype.kind == "f" else np.iinfo(dtype).max
    return [random.randint(0, min(top, 2**31 - 1), length, dtype=np.int64).astype(dtype) for length in LENGTHS]


def test_dtypes_are_theirs(theirs):
    assert {kind.value: np.dtype(theirs.DType.dtype_from_code(kind.value)) for kind in theirs.DType} == DTYPES
    assert all(theirs.DType.code_from_dtype(dtype.type) == code for dtype, code in CODES.items())
    for vocab_size in (10, 65499, 65500, 70000, 131072):
        assert token_dtype(vocab_size) == theirs.DType.optimal_dtype(vocab_size)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_both_write_the_same_bytes_and_read_each_others(theirs, tmp_path, dtype):
    written = documents(dtype)
    with indexed_writer(tmp_path / "ours", dtype) as writer:
        for tokens in written:
            writer.add(tokens)
        writer.add(written[0], written[3])
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    for tokens in written:
        builder.add_document(tokens, [len(tokens)])
    builder.add_document(np.concatenate([written[0], written[3]]), [len(written[0]), len(written[3])])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert Path(tmp_path / f"ours.{suffix}").read_bytes() == Path(tmp_path / f"theirs.{suffix}").read_bytes()
    ours, read = IndexedDataset(tmp_path / "theirs"), theirs.IndexedDataset(str(tmp_path / "ours"))
    assert len(ours) == len(read) == len(LENGTHS) + 2
    for index, tokens in enumerate([*written, written[0], written[3]]):
        assert np.array_equal(ours[index], tokens) and np.array_equal(read[index], tokens)
        assert ours[index].dtype == read[index].dtype == dtype
    assert np.array_equal(ours.lengths, read.sequence_lengths) and np.array_equal(ours.documents, read.document_indices)
    assert np.array_equal(ours.offsets, read.index.sequence_pointers)


def test_items_and_merged_indices_of_theirs_are_read(theirs, tmp_path):
    for name in ("a", "b"):
        builder = theirs.IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.int32)
        for at in range(3):
            builder.add_item(torch.arange(at + 1) + ord(name))
        builder.end_document()
        builder.add_item(torch.tensor([70000]))
        builder.end_document()
        builder.finalize(str(tmp_path / f"{name}.idx"))
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "merged.bin"), dtype=np.int32)
    for name in ("a", "b"):
        builder.add_index(str(tmp_path / name))
    builder.finalize(str(tmp_path / "merged.idx"))
    found = IndexedDataset(tmp_path / "merged")
    assert found.starts(0, found.num_tokens).tolist() == [0, 6, 7, 13] and found.tokens[[0, 6, 7]].tolist() == [97, 70000, 98]


def test_multimodal_files_of_theirs_are_refused(theirs, tmp_path):
    builder = theirs.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32, multimodal=True)
    builder.add_document(np.arange(4), [4], [1])
    builder.finalize(str(tmp_path / "a.idx"))
    with pytest.raises(ValueError, match="multimodal"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize(
    "blend",
    [["30", "web", "70", "books"], ["web", "books"], ["web"], ["1", "2", "3"], ["0.5", " web "], ["0.2", "a", "0.3", "b", "1", "c"]],
)
def test_blends_are_read_as_theirs(blend):
    from megatron.core.datasets.utils import get_blend_from_list

    prefixes, weights = get_blend_from_list(blend)
    ours = parse_blend(blend, key="train")
    assert (list(ours.prefixes), list(ours.weights) if ours.weights else None) == (prefixes, weights)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.5, 0.25, 0.125, 0.125], [1 / n for n in range(1, 12)]])
def test_datasets_take_turns_as_theirs_do(weights):
    """After any number of rows, each dataset has had as many as under megatron-core's blending, to within two; and they come in order."""
    from megatron.core.datasets import helpers

    count, share = 20_000, np.array(weights) / sum(weights)
    places, numbers = np.zeros(count, dtype=np.int16), np.zeros(count, dtype=np.int64)
    helpers.build_blending_indices(places, numbers, share.tolist(), len(weights), count, False)
    turns = Turns(weights)
    ours = np.array([turns[number] for number in range(count)])
    for place in range(len(weights)):
        assert np.abs(np.cumsum(ours[:, 0] == place) - np.cumsum(places == place)).max() <= 2
        assert (ours[ours[:, 0] == place, 1] == np.arange((ours[:, 0] == place).sum())).all()
