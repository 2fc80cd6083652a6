"""`export adapter` and `convert adapter`: what they write, say and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nemotune.cli.main import app
from nemotune.errors import NemotuneError
from nemotune.lora import apply_lora, lora_modules, save_adapter
from nemotune.models import load_model
from nemotune.recipe import Lora


@pytest.fixture(scope="module")
def saved(hybrid_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 12 on attention and experts."""
    model, lora = load_model(hybrid_dir, dtype="float32"), Lora(rank=12, alpha=8, targets=("attention", "experts"))
    apply_lora(model, lora)
    for _, layer in lora_modules(model):
        torch.nn.init.normal_(layer.lora_B)
    directory = tmp_path_factory.mktemp("adapter") / "mine"
    save_adapter(model, directory, lora, base="nvidia/base")
    return directory


def typed(*words: object) -> str:
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception is not None:
        raise done.exception
    return " ".join(done.output.split())


def test_an_adapter_is_exported_for_vllm_with_the_command_that_serves_it(saved: Path, hybrid_dir: Path, tmp_path: Path) -> None:
    told = typed("export", "adapter", "--for", "vllm", "--model", hybrid_dir, "--adapter", saved, "--output", tmp_path / "served")
    assert "56 tensors were read back and hold its values" in told  # 4 modules of attention, 2 x 2 x 6 experts
    serve = f"vllm serve nvidia/base --enable-lora --lora-modules served={tmp_path / 'served'} --max-lora-rank 16"
    assert f"wrote {tmp_path / 'served'} next: {serve}" in told


def test_the_adapter_of_a_run_is_exported_beside_it(saved: Path, hybrid_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter").symlink_to(saved)
    told = typed("export", "adapter", "quickstart", f"model.path={hybrid_dir}", "--run-dir", tmp_path / "run", "--for", "vllm")
    assert (tmp_path / "run" / "export" / "adapter-vllm" / "adapter_model.safetensors").is_file() and "--max-lora-rank 16" in told


def test_an_adapter_for_llama_cpp_is_one_file(saved: Path, hybrid_dir: Path, tmp_path: Path) -> None:
    words = ("convert", "adapter", "--from", saved, "--base", hybrid_dir, "--to", "llama.cpp", "--overwrite", "--output")
    told = typed(*words, tmp_path / "mine.gguf")
    assert f"wrote {tmp_path / 'mine.gguf'} next: llama-server -m BASE.gguf --lora {tmp_path / 'mine.gguf'}" in told
    assert (tmp_path / "mine.gguf").read_bytes()[:4] == b"GGUF"
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.raises(NemotuneError, match="is no GGUF file by its name"):
        typed(*words, tmp_path / "notes.txt")


def test_an_adapter_is_converted_there_and_back(saved: Path, hybrid_dir: Path, tmp_path: Path) -> None:
    typed("convert", "adapter", "--from", saved, "--base", hybrid_dir, "--to", "vllm", "--output", tmp_path / "a")
    typed("convert", "adapter", "--from", tmp_path / "a", "--base", hybrid_dir, "--to", "peft", "--output", tmp_path / "b")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "b" / file).read_bytes() == (saved / file).read_bytes()


def test_a_base_that_is_nowhere_is_told(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(NemotuneError, match="^--base: ./none is no directory, no built-in model and no hub id"):
        typed("convert", "adapter", "--from", saved, "--base", "./none", "--to", "vllm", "--output", tmp_path / "a")
    with pytest.raises(NemotuneError, match="^--to: got 'vlm'. Did you mean 'vllm'"):
        typed("convert", "adapter", "--from", saved, "--base", "./none", "--to", "vlm", "--output", tmp_path / "a")


def test_a_run_or_a_whole_model_in_place_of_an_adapter_is_told(hybrid_dir: Path, tmp_path: Path) -> None:
    words = ("convert", "adapter", "--base", hybrid_dir, "--to", "peft", "--output", tmp_path / "a", "--from")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").touch()
    with pytest.raises(NemotuneError, match="^--from: .*/run is the directory of a run; its adapter is .*/run/adapter$"):
        typed(*words, tmp_path / "run")
    typed("convert", "import", "--hf", hybrid_dir, "--megatron", tmp_path / "checkpoint")
    with pytest.raises(NemotuneError, match="is a checkpoint of a model, expected one of LoRA; `nemotune convert export`"):
        typed(*words, tmp_path / "checkpoint")


def test_a_dry_run_writes_nothing(saved: Path, hybrid_dir: Path, tmp_path: Path) -> None:
    told = typed("convert", "adapter", "--from", saved, "--base", hybrid_dir, "--to", "vllm", "--output", tmp_path / "a", "--dry-run")
    assert f"would write {tmp_path / 'a'} for vllm: 82.9 kB, 8 modules of nvidia/base" in told and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--for", "vlm", "--model", "M", "--adapter", "A", "--output", "O"], "--for: got 'vlm'. Did you mean 'vllm'? Known: peft, vllm, llama.cpp, megatron"),
        (["--for", "vllm", "--model", "M", "--adapter", "A"], "--output: --model, --adapter and --output go together, without a recipe"),
        (["--for", "vllm", "--adapter", "A", "--output", "O"], "--model: --model, --adapter and --output go together, without a recipe"),
        (["--for", "vllm", "--run-dir", "nowhere"], "nowhere/adapter: nothing trained yet; `nemotune train` comes first"),
        (["quickstart", "--for", "vllm", "method=full", "export.merged=false"], "method: full leaves a whole model"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_told(words: list[str], message: str) -> None:
    with pytest.raises(NemotuneError) as error:
        typed("export", "adapter", *words)
    assert message in str(error.value)


def test_only_an_adapter_is_replaced_and_never_the_one_that_is_read(saved: Path, hybrid_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    words = ("convert", "adapter", "--from", saved, "--base", hybrid_dir, "--to", "vllm", "--overwrite", "--output")
    with pytest.raises(NemotuneError, match="holds no adapter"):
        typed(*words, tmp_path / "notes")
    with pytest.raises(NemotuneError, match="holds .*, which is read"):
        typed(*words, saved)
    typed("convert", "import", "--hf", hybrid_dir, "--megatron", tmp_path / "base-checkpoint")
    with pytest.raises(NemotuneError, match="base-checkpoint holds no adapter"):
        typed(*words, tmp_path / "base-checkpoint")
    with pytest.raises(NemotuneError, match="holds .*, which is read"):
        typed(*words, hybrid_dir)
    typed(*words, tmp_path / "out")
    typed(*words, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_parameters"] is None
