"""Directories of torch.distributed.checkpoint files: any part of a tensor from any chunks, and nothing in them is run or believed."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from nemotune.errors import CheckpointError, MissingFileError
from nemotune.train.storage import Block, write_blocks
from nemotune.weights import dcp as reading
from nemotune.weights.dcp import DcpDirectory
from nemotune.weights.dcp_metadata import load_metadata

WHOLE = torch.randn(4, 10, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
RANKS = [(e, r, c) for e in (0, 2) for r in (0, 3, 7) for c in (0, 4)]  # expert parallel x row parallel x column parallel, unequal


@pytest.fixture
def sharded(tmp_path):
    """`w` in chunks as many ranks leave them, and a small tensor."""
    ends = {0: 2, 2: 4}, {0: 3, 3: 7, 7: 10}, {0: 4, 4: 6}
    blocks = []
    for place in RANKS:
        values = WHOLE[tuple(slice(at, end[at]) for at, end in zip(place, ends, strict=True))].clone()
        blocks.append(Block("w", tuple(WHOLE.shape), place, values))
    blocks.append(Block("bias", (5,), (0,), torch.arange(5.0)))
    write_blocks(blocks, tmp_path / "ckpt", beside=lambda directory: None)
    return tmp_path / "ckpt"


def change(directory, do):
    """Let `do` change the metadata on disk."""
    metadata = load_metadata(directory)
    do(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def place_of(metadata, name):
    return next(place for index, place in metadata.storage_data.items() if index.fqn == name)


def test_any_part_of_a_tensor_is_put_together_from_whatever_chunks_there_are(sharded):
    opened, rng = DcpDirectory(sharded), random.Random(0)
    assert opened.tensors["w"].shape == (4, 10, 6) and opened.tensors["w"].dtype == torch.bfloat16
    assert torch.equal(opened.read("w"), WHOLE) and torch.equal(opened.read("bias", (1,), (3,)), torch.arange(1.0, 4.0))
    for _ in range(60):
        first = [rng.randrange(size) for size in WHOLE.shape]
        sizes = [rng.randint(1, size - at) for at, size in zip(first, WHOLE.shape, strict=True)]
        assert torch.equal(opened.read("w", first, sizes), WHOLE[tuple(slice(a, a + n) for a, n in zip(first, sizes, strict=True))])


def test_of_a_large_entry_only_the_rows_asked_for_are_read(tmp_path, monkeypatch):
    dcp.save({"w": torch.arange(1_000_000.0).view(1000, 1000)}, checkpoint_id=tmp_path, no_dist=True)
    opened, read = DcpDirectory(tmp_path), []
    plain = reading._Span.readinto
    monkeypatch.setattr(reading._Span, "readinto", lambda span, buffer: read.append(plain(span, buffer)) or read[-1])
    assert opened.read("w", (500, 0), (2, 1000))[1, 3] == 501_003
    assert sum(read) < 100_000  # of 4,000,000


def test_a_tensor_that_was_saved_transposed_reads_alike(tmp_path):
    dcp.save({"w": WHOLE[0].T}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(DcpDirectory(tmp_path).read("w", (2, 3), (4, 5)), WHOLE[0].T[2:6, 3:8])


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_view_of_a_larger_storage_reads_alike_and_a_packed_entry_too(sharded, kind):
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.arange(-7.0, 13.0)[7:12], plain)  # all 20 values are saved
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", kind) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    (sharded / "other.distcp").write_bytes(packed.getvalue())

    def moved(metadata):
        index = next(index for index in metadata.storage_data if index.fqn == "bias")
        place = metadata.storage_data[index]
        metadata.storage_data[index] = replace(place, relative_path="other.distcp", offset=0, length=len(packed.getvalue()))

    change(sharded, moved)
    assert DcpDirectory(sharded).read("bias", (1,), (3,)).tolist() == [1, 2, 3]


def test_what_is_no_tensor_is_named_and_never_read(tmp_path):
    dcp.save({"w": WHOLE, "of_a_rank": io.BytesIO(b"anything")}, checkpoint_id=tmp_path, no_dist=True)
    opened = DcpDirectory(tmp_path)
    assert opened.objects == {"of_a_rank"} and set(opened.tensors) == {"w"}


def test_a_tensor_of_which_a_chunk_is_missing_is_refused_when_that_is_asked_for(sharded):
    change(sharded, lambda metadata: metadata.state_dict_metadata["w"].chunks.pop())
    opened = DcpDirectory(sharded)
    assert torch.equal(opened.read("w", (0, 0, 0), (2, 10, 6)), WHOLE[:2])
    with pytest.raises(CheckpointError, match=r"w: its chunks do not fill \[4, 10, 6\] from \[0, 0, 0\] on; copy all files"):
        opened.read("w")


class Command:
    """Runs code where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_in_metadata_or_entries_is_refused_and_not_run(sharded, tmp_path):
    torch.save(Command(tmp_path / "run"), sharded / "command")

    def lies_in_command(metadata):
        place = place_of(metadata, "bias")
        place.relative_path, place.offset, place.length = "command", 0, (sharded / "command").stat().st_size

    change(sharded, lies_in_command)
    with pytest.raises(CheckpointError, match=r"command: bias: cannot be read .*; copy the checkpoint again"):
        DcpDirectory(sharded).read("bias")
    (sharded / ".metadata").write_bytes(pickle.dumps(Command(tmp_path / "run")))
    with pytest.raises(
        CheckpointError, match=r"\.metadata names posix\.mkdir, which .* does not write; copy the checkpoint again, from whom you trust"
    ):
        DcpDirectory(sharded)
    assert not (tmp_path / "run").exists()


def set_place(**values):
    def do(metadata):
        for name, value in values.items():
            setattr(place_of(metadata, "bias"), name, value)

    return do


def set_chunk(**values):
    def do(metadata):
        stored = metadata.state_dict_metadata["bias"]
        stored.chunks[0] = replace(stored.chunks[0], **{name: torch.Size(value) for name, value in values.items()})
        for index in [index for index in metadata.storage_data if index.fqn == "bias"]:
            metadata.storage_data[replace(index, offset=stored.chunks[0].offsets)] = metadata.storage_data.pop(index)

    return do


@pytest.mark.parametrize(
    ("do", "error"),
    [
        (set_place(relative_path="../secret"), r"names the file '\.\./secret', expected one of this directory"),
        (set_place(relative_path="/etc/passwd"), r"names the file '/etc/passwd'"),
        (set_place(offset=10**12), r"has \d+ bytes, \.metadata says at least 1000000\d+"),
        (set_place(offset=-5), r"places bias at -5"),
        (set_place(length="1"), r"places bias at \d+, '1' bytes"),
        (set_place(length=3), r"bias: a chunk of \[5\] is said to lie in 3 bytes"),
        (set_place(transform_descriptors=["zstd"]), r"bias is stored transformed"),
        (set_chunk(sizes=[10**15]), r"a chunk of \[1000000000000000\] from \[0\] on leaves its shape \[5\]"),
        (set_chunk(offsets=[3]), r"a chunk of \[5\] from \[3\] on leaves its shape \[5\]"),
        (lambda metadata: metadata.storage_data.clear(), r"says nothing of where (w|bias) from"),
    ],
)  # fmt: skip
def test_metadata_that_lie_are_refused_before_anything_is_read(sharded, do, error):
    change(sharded, do)
    with pytest.raises(CheckpointError, match=error):
        DcpDirectory(sharded)


def test_chunks_that_lie_over_one_another_do_not_fill_the_gap_that_they_leave(sharded):
    """As many values in all as the tensor has; those of the gap would be whatever is in memory."""

    def moved(metadata):
        stored = metadata.state_dict_metadata["w"]
        at = {tuple(chunk.offsets): i for i, chunk in enumerate(stored.chunks)}
        first, second = at[0, 0, 0], at[2, 0, 0]
        stored.chunks[second] = stored.chunks[first]

    change(sharded, moved)
    with pytest.raises(CheckpointError, match="do not fill"):
        DcpDirectory(sharded).read("w")


def test_an_entry_of_another_dtype_or_shape_than_told_is_refused(sharded):
    def told_as_ints(metadata):
        metadata.state_dict_metadata["bias"].properties.dtype = torch.int32

    change(sharded, told_as_ints)
    with pytest.raises(CheckpointError, match=r"an entry is torch\.float32 \[5\], expected torch\.int32 \[5\]"):
        DcpDirectory(sharded).read("bias")


def test_files_that_are_missing_or_cut_off_are_named(sharded):
    file = next(sharded.glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"{file.name}: has {len(content) - 1} bytes, \.metadata says at least {len(content)}"):
        DcpDirectory(sharded)
    file.unlink()
    with pytest.raises(MissingFileError, match=rf"{file.name}: is missing"):
        DcpDirectory(sharded)


class MCoreMetadata(Metadata):
    """Stands in for the class of older Megatron-LM."""


def test_metadata_of_older_megatron_reads_without_megatron(sharded):
    theirs = MCoreMetadata(**vars(load_metadata(sharded)))
    dumped = pickle.dumps(theirs, protocol=2).replace(
        f"c{__name__}\nMCoreMetadata\n".encode(), b"cmegatron.core.dist_checkpointing.strategies.torch\nMCoreMetadata\n"
    )
    assert b"megatron.core" in dumped
    (sharded / ".metadata").write_bytes(dumped)
    assert torch.equal(DcpDirectory(sharded).read("w"), WHOLE)
