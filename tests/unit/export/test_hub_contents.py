"""What of a directory is sent to the hub: known by kind, whole, and nothing private in its texts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemotune.errors import CheckpointError, DataError, MissingFileError
from nemotune.export.hub.contents import Content, kind_of, of_directory, refuse_private


@pytest.fixture
def adapter(tmp_path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    save_file({"a": torch.ones(8)}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/data/jo/base", "r": 2}))
    return directory


@pytest.fixture
def gguf(tmp_path) -> Path:
    from gguf import GGUFWriter

    directory = tmp_path / "export"
    directory.mkdir()
    writer = GGUFWriter(directory / "model-f32.gguf", "llama")
    writer.add_tensor("token_embd.weight", torch.ones(64, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory


def test_directory_of_the_base_is_sent_by_its_name_and_all_else_as_it_lies(adapter):
    (adapter / "generation_config.json").write_text('{"eos_token_id":  [2, 11]}')
    contents, left_out = of_directory(adapter, base="nvidia/nano")
    found = {content.name: content.source for content in contents}
    assert json.loads(found["adapter_config.json"]) == {"base_model_name_or_path": "nvidia/nano", "r": 2}
    assert found["generation_config.json"] == adapter / "generation_config.json" and left_out == []


def test_strangers_are_left_out_and_named(adapter):
    for name in ("optimizer.pt", "train.jsonl", ".env", "notes.md"):
        (adapter / name).write_text("x")
    (adapter / "checkpoints").mkdir()
    contents, left_out = of_directory(adapter, base="b")
    assert [content.name for content in contents] == ["adapter_config.json", "adapter_model.safetensors"]
    assert left_out == [".env", "checkpoints", "notes.md", "optimizer.pt", "train.jsonl"]


def test_what_is_still_being_written_is_refused(adapter):
    (adapter / ".adapter_model.safetensors.partial").write_text("")
    with pytest.raises(CheckpointError, match="still being written, or was cut off; export again"):
        of_directory(adapter, base="b")
    (adapter / ".adapter_model.safetensors.partial").rename(adapter / ".merged.partial")  # of another export
    assert of_directory(adapter, base="b")[1] == [".merged.partial"]


def test_cut_off_shard_of_a_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(64)}, tmp_path / "model.safetensors")
    assert kind_of(tmp_path) == "model" and len(of_directory(tmp_path, base="b")[0]) == 2
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        of_directory(tmp_path, base="b")


def test_gguf_is_whole_or_refused(gguf):
    assert kind_of(gguf) == "gguf" and [content.name for content in of_directory(gguf, base="b")[0]] == ["model-f32.gguf"]
    path = gguf / "model-f32.gguf"
    whole = path.read_bytes()
    for cut in (whole[:-1], whole[:100], b"GGUF", b"none of it"):
        path.write_bytes(cut)
        with pytest.raises(CheckpointError, match=r"model-f32.gguf: .*export it again"):
            of_directory(gguf, base="b")


def test_directory_of_none_of_the_kinds_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no adapter"):
        kind_of(tmp_path)
    with pytest.raises(MissingFileError, match="no such directory"):
        kind_of(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("token: hf_" + "a" * 34, "a token"),
        ("AKIA" + "A1" * 8, "a token"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ("FROM /home/jo/model.gguf", "a path of this machine"),
        ("C:\\Users\\jo\\rows", "a path of this machine"),
        ("FROM /srv/runs/toy/export/model.gguf", "a path of this machine"),
        ("of mine: s3cr3t", "your token"),
    ],
)
def test_private_text_is_refused_by_file_and_kind(text, what):
    with pytest.raises(DataError, match=rf"^Modelfile: holds {what}; take it out"):
        refuse_private([Content("Modelfile", text.encode())], secrets=["s3cr3t"], directories=[Path("/srv/runs/toy")])


def test_public_text_and_the_bases_vocabulary_pass():
    text = b"see https://huggingface.co/home/x, /srv/runs/toys and hf_hub_download"
    contents = [Content("README.md", text), Content("tokenizer.json", b"/home/jo"), Content("model.safetensors", b"/home/jo")]
    refuse_private(contents, directories=[Path("/srv/runs/toy"), Path("/")])


def test_ids_are_those_of_the_hub_for_bytes_and_files(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"what is up, doc?")
    for content in (Content("a", path), Content("a", path.read_bytes())):
        assert content.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert content.git_id == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"  # git's own book, chapter 10.2
