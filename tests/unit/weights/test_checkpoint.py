"""Reading shards by header and writing them tensor by tensor."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotune.errors import CheckpointError, MissingFileError
from nemotune.weights import Checkpoint, Stack, WritePlan, is_finite, write_checkpoint
from nemotune.weights.dtypes import TORCH_DTYPES
from nemotune.weights.mapping import pieces_of

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.tensor(3.0, dtype=torch.bfloat16),
    "c": torch.arange(5, dtype=torch.int64), "d": torch.tensor([True, False]), "e": torch.zeros(0, 4, dtype=torch.float16),
}  # fmt: skip
ROWS = [("a", "F32", (2, 3)), ("b", "BF16", ()), ("c", "I64", (5,)), ("d", "BOOL", (2,)), ("e", "F16", (0, 4))]


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30])
def test_what_is_written_is_read_by_safetensors_and_by_us(tmp_path, max_shard_bytes):
    plan = WritePlan.in_shards(ROWS, max_shard_bytes=max_shard_bytes)
    written = []
    write_checkpoint(tmp_path, plan, lambda info: TENSORS[info.name], done=written.append)
    theirs = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    ours = Checkpoint(tmp_path)
    assert theirs.keys() == ours.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(theirs[n], t) and torch.equal(ours.read(n), t) and ours.tensors[n].shape == t.shape for n, t in TENSORS.items())
    assert sum(written) == plan.num_bytes == ours.num_bytes
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_bytes == 30)
    for file in tmp_path.glob("*.safetensors"):
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0, "the format's alignment of what follows the header"


def sharded(path):
    save_file({"a": torch.ones(2)}, path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, path / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingFileError, match="1 of 2 shards are missing, first model-00002-of-00002"):
        Checkpoint(tmp_path)


def test_an_index_that_promises_more_than_the_shards_hold_is_refused(tmp_path):
    index = sharded(tmp_path)
    index["weight_map"]["c"] = index["weight_map"]["a"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="first c"):
        Checkpoint(tmp_path)


def test_an_index_cannot_point_outside_its_directory(tmp_path):
    index = sharded(tmp_path)
    index["weight_map"]["a"] = "../secret.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="secret"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index", [[], {"weight_map": 3}, {"weight_map": {"a": 5}}, {"weight_map": {"a": ["x"]}}, {"weight_map": {"a": None}}, {}]
)
def test_an_index_of_something_else_is_named(tmp_path, index):
    for text in (json.dumps(index), "[" * 10**5):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="index.json: cannot be read"):
            Checkpoint(tmp_path)


def test_of_a_tensor_in_two_shards_the_indexs_counts(tmp_path):
    index = sharded(tmp_path)
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, tmp_path / index["weight_map"]["b"])
    assert Checkpoint(tmp_path).read("a").tolist() == [1, 1]
    index["weight_map"] |= {"a": index["weight_map"]["b"], "b": index["weight_map"]["a"]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="first b"):
        Checkpoint(tmp_path)


def test_a_dtype_that_is_not_known_is_named(tmp_path):
    head = json.dumps({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(8))
    with pytest.raises(CheckpointError, match="a: F4"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [name for name, dtype in TORCH_DTYPES.items() if dtype.is_floating_point])
def test_a_value_that_is_not_finite_is_found_in_every_dtype(dtype):
    numbers = torch.tensor([1.0, 2.0]).to(TORCH_DTYPES[dtype])
    assert is_finite(numbers) and not is_finite(torch.tensor([1.0, torch.nan]).to(TORCH_DTYPES[dtype]))


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b"\xff" * 8 + b[8:], lambda b: b[:4], lambda b: b""])
def test_a_damaged_shard_is_named(tmp_path, damage):
    save_file({"a": torch.ones(20)}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="model.safetensors: cannot be read"):
        Checkpoint(tmp_path)


def test_a_shard_that_loses_its_end_after_it_was_opened_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.arange(6.0).view(2, 3)}, path)
    checkpoint = Checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    assert checkpoint.read("a").tolist() == [1, 1, 1, 1]
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*4 bytes of b are missing"):
        checkpoint.read("b")


@pytest.mark.skipif(sys.platform != "linux", reason="lists what is mapped")
def test_what_is_read_maps_no_file(tmp_path):
    """Pages of a mapped shard would count as the process's own, beside the copy of them that is the model."""
    save_file({"a": torch.arange(12.0).view(4, 3)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    held = [checkpoint.read("a"), *checkpoint.slices("a", 3)]
    assert torch.equal(held[0], torch.cat(held[1:])) and len(held) == 3
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_only_safetensors_are_read(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(MissingFileError, match="only safetensors"):
        Checkpoint(tmp_path)


def test_stacked_parameters_have_a_piece_per_expert():
    stacks = (Stack(r"(.*\.experts)\.((?:up|down)_proj\.weight)"),)
    pieces = pieces_of("layers.1.mixer.experts.up_proj.weight", (3, 8, 4), stacks)
    assert [(p.name, p.index) for p in pieces] == [(f"layers.1.mixer.experts.{e}.up_proj.weight", e) for e in range(3)]
    assert [(p.name, p.index) for p in pieces_of("layers.1.norm.weight", (8,), stacks)] == [("layers.1.norm.weight", None)]
