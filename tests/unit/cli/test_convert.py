"""`convert import`, `convert export` and `convert inspect`: what they write, say and refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_models import make
from typer.testing import CliRunner

from nemotune.cli.main import app
from nemotune.errors import ConflictError, MissingFileError
from nemotune.lora import apply_lora, lora_modules, save_adapter
from nemotune.models import load_model
from nemotune.recipe import Lora


def typed(*words: object) -> str:
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception is not None:
        raise done.exception
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, and the checkpoint that `convert import` made of it."""
    path = tmp_path_factory.mktemp("convert")
    make("hybrid").bfloat16().save_pretrained(path / "hf")
    told = typed("convert", "import", "--hf", path / "hf", "--megatron", path / "megatron", "--verify")
    assert "read back and mapped the other way: all 63 tensors are the source's, bit for bit" in told
    assert f"wrote {path / 'megatron'} next: nemotune convert inspect {path / 'megatron'}" in told
    return {"hf": path / "hf", "megatron": path / "megatron"}


def test_a_checkpoint_comes_back_by_itself_and_with_its_base(places: dict[str, Path], tmp_path: Path) -> None:
    told = typed("convert", "export", "--megatron", places["megatron"], "--hf", tmp_path / "alone")
    assert f"wrote {tmp_path / 'alone'} next: vllm serve {tmp_path / 'alone'}" in told
    typed("convert", "export", "--megatron", places["megatron"], "--hf", tmp_path / "back", "--base", places["hf"], "--verify")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (places["hf"] / file).read_bytes()


def test_inspection_tells_names_shapes_dtypes_and_that_all_is_there(places: dict[str, Path]) -> None:
    told = typed("convert", "inspect", places["megatron"])
    assert f"{places['megatron'] / 'iter_0000000'}: iteration 0000000, MambaModelProvider" in told
    assert "decoder.layers.*.mlp.experts.experts.linear_fc1.weight 2 x 6 x 24 x 32 BF16 18.4 kB" in told
    assert "every tensor of nemotron_h is there, in its shape" in told and "not there" not in told


def test_inspection_tells_what_is_missing(places: dict[str, Path], tmp_path: Path) -> None:
    make("hybrid", vocab_size=128, num_hidden_layers=7, hybrid_override_pattern="ME*-MEM").save_pretrained(tmp_path / "other")
    told = typed("convert", "inspect", places["megatron"], "--hf", tmp_path / "other")
    assert "backbone.layers.6.mixer.in_proj.weight: the checkpoint has nothing of it, expected shape" in told
    assert "backbone.embeddings.weight: got shape (96, 32), expected (128, 32)" in told


def test_an_adapter_becomes_a_lora_checkpoint_that_is_inspected_and_merged(places: dict[str, Path], tmp_path: Path) -> None:
    model, lora = load_model(places["hf"], dtype="float32"), Lora(rank=2, alpha=4, targets=("attention", "experts"))
    apply_lora(model, lora)
    for _, layer in lora_modules(model):
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(model, tmp_path / "adapter", lora, base="base")
    base = ("--base", places["hf"])
    typed("convert", "adapter", "--from", tmp_path / "adapter", *base, "--to", "megatron", "--output", tmp_path / "lora")
    assert "a LoRA checkpoint: 8 modules adapted, rank 2, alpha 4" in typed("convert", "inspect", tmp_path / "lora")
    typed("convert", "adapter", "--from", tmp_path / "lora", *base, "--to", "peft", "--output", tmp_path / "back")
    assert (tmp_path / "back" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    with pytest.raises(MissingFileError, match="is a LoRA checkpoint, without a model; name the one that it was trained on with --base"):
        typed("convert", "export", "--megatron", tmp_path / "lora", "--hf", tmp_path / "merged")
    told = typed("convert", "export", "--megatron", tmp_path / "lora", *base, "--hf", tmp_path / "merged")
    assert "28 of 63 tensors updated" in told and "28 updated tensors are base + adapter" in told


def test_dry_runs_write_nothing_and_nothing_of_another_kind_is_replaced(places: dict[str, Path], tmp_path: Path) -> None:
    assert "would write" in typed("convert", "import", "--hf", places["hf"], "--megatron", tmp_path / "a", "--dry-run")
    assert "would write" in typed("convert", "export", "--megatron", places["megatron"], "--hf", tmp_path / "a", "--dry-run")
    assert not (tmp_path / "a").exists()
    with pytest.raises(ConflictError, match=r"--megatron: .* holds no checkpoint of Megatron-Bridge, so --overwrite does not replace it"):
        typed("convert", "import", "--hf", places["hf"], "--megatron", places["hf"], "--overwrite")
    with pytest.raises(ConflictError, match=r"--hf: .* holds no model \(no config\.json\), so --overwrite does not replace it"):
        typed("convert", "export", "--megatron", places["megatron"], "--hf", places["megatron"], "--overwrite")
    with pytest.raises(ConflictError, match="already exists"):
        typed("convert", "import", "--hf", places["hf"], "--megatron", places["megatron"])
    typed("convert", "import", "--hf", places["hf"], "--megatron", places["megatron"], "--overwrite")
