"""`nemotune export gguf`: what it writes, says and refuses."""

from __future__ import annotations

import io
import shutil
from functools import partial
from pathlib import Path

import pytest
from gguf import GGUFReader
from rich.console import Console
from toy_gguf import TINY
from typer.testing import CliRunner

from nemotune.cli import export_gguf
from nemotune.data import progress
from nemotune.errors import ConflictError, MissingFileError, NemotuneError, RecipeError, UnsupportedError
from nemotune.export.gguf import llama_cpp
from nemotune.lora import apply_lora, save_adapter
from nemotune.models import load_model
from nemotune.recipe import Lora, load
from nemotune.workflow import stages


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)


def typed(*words: object) -> str:
    done = CliRunner().invoke(export_gguf.app, list(map(str, words)))
    if done.exception is not None:
        raise done.exception
    return done.output


def staged(run_dir: Path, *overrides: str, **options) -> str:
    told = io.StringIO()
    recipe = load("quickstart", ["name=toy", *overrides])
    settings = {"output": None, "overwrite": False, "dry_run": False} | options
    stages.gguf(recipe, run_dir=run_dir, console=Console(file=told, width=200), **settings)
    return told.getvalue()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run that left an adapter of nemotron-tiny."""
    run_dir = tmp_path_factory.mktemp("run")
    model, lora = load_model(TINY, dtype="float32"), Lora(rank=2, targets=("attention",))
    apply_lora(model, lora)
    save_adapter(model, run_dir / "adapter", lora, base=str(TINY))
    return run_dir


def test_a_model_is_written_as_each_type(tmp_path):
    told = typed("--model", TINY, "--output", tmp_path, "--type", "q8_0", "--type", "f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nemotron-tiny-f16.gguf", "nemotron-tiny-q8_0.gguf"]
    assert "8.5" in told and "16.05 bits per weight" in told and "read back: 45 tensors, the values of 45" in told
    assert "not loaded by llama.cpp" in told and "pip install 'nemotune[llama-cpp]'" in told
    assert (
        told.splitlines()[-1]
        == f"wrote {tmp_path}/nemotron-tiny-f16.gguf   next: llama-server -m {tmp_path}/nemotron-tiny-f16.gguf --jinja"
    )
    with pytest.raises(ConflictError, match=r"nemotron-tiny-f16.gguf: already exists; --type q4_k_m writes what is missing, --overwrite"):
        typed("--model", TINY, "--output", tmp_path, "--type", "q4_k_m", "--type", "f16")
    assert not (tmp_path / "nemotron-tiny-q4_k_m.gguf").exists()
    typed("--model", TINY, "--output", tmp_path, "--type", "f16", "--overwrite")


def test_a_dry_run_tells_size_and_share_of_wider_types_and_writes_nothing(tmp_path):
    told = typed("--model", "nemotron-tiny", "--output", tmp_path / "tiny.gguf", "--dry-run")
    assert told.startswith(f"would write {tmp_path}/tiny.gguf: 2.4 MB, 5.36 bits per weight") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, error, message",
    [
        (["--adapter", "x"], RecipeError, "--model: --model and --output go together"),
        (["--model", TINY], RecipeError, "--output: --model and --output go together"),
        (
            ["--model", TINY, "--output", "o.gguf", "--type", "f16", "--type", "f32"],
            ConflictError,
            "--output: got one file, o.gguf, for 2 types",
        ),
        (["--model", TINY, "--output", "out", "--type", "q4"], UnsupportedError, "--type: got 'q4', expected one of f32"),
        (
            ["--model", "/nowhere", "--output", "out"],
            MissingFileError,
            "^--model: /nowhere is no directory, no built-in model and no hub id",
        ),
        (["runs/mine", "--model", TINY, "--output", "out"], RecipeError, "--model: got runs/mine as well, expected a run or a model"),
        (
            ["--model", "nvidia/nowhere", "--output", "out"],
            MissingFileError,
            "^--model: nvidia/nowhere is no directory here and could not be had",
        ),
        (["quickstart", "--run-dir", "/nowhere"], MissingFileError, "/nowhere/adapter: nothing trained yet"),
    ],
)
def test_mistakes_are_told(words, error, message):
    with pytest.raises(error, match=message) as caught:
        typed(*words)
    assert isinstance(caught.value, NemotuneError)


def test_a_directory_of_another_kind_is_told_with_what_to_type(run_dir, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("0")
    with pytest.raises(RecipeError, match="--model: .*/run is the directory of a run; name it without --model"):
        typed("--model", tmp_path / "run", "--output", "out")
    with pytest.raises(ConflictError, match="--output: .*iteration.txt is a file without .gguf at its end"):
        typed("--model", TINY, "--output", tmp_path / "latest_checkpointed_iteration.txt")
    with pytest.raises(RecipeError, match="--adapter: .*/run is the directory of a run"):
        typed("--model", TINY, "--adapter", tmp_path / "run", "--output", "out")
    with pytest.raises(RecipeError, match="--model: .*/adapter is an adapter; name it with --adapter"):
        typed("--model", run_dir / "adapter", "--output", "out")
    with pytest.raises(RecipeError, match="--adapter: .* is a checkpoint of Megatron-Bridge; `nemotune convert export` merges"):
        typed("--model", TINY, "--adapter", tmp_path, "--output", "out")


def test_a_terminal_tells_that_the_file_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "Console", partial(Console, force_terminal=True, width=60))
    typed_here = CliRunner().invoke(export_gguf.app, ["--model", str(TINY), "--output", str(tmp_path / "m.gguf"), "--type", "f16"])
    told = typed_here.stderr
    assert 0 < told.index("writing m.gguf") < told.index("reading m.gguf back")


def test_a_runs_adapter_is_exported_under_its_name_as_its_recipe_says(run_dir):
    told = staged(run_dir, "export.gguf=[f16, bf16]", alone=False)
    assert sorted(path.name for path in (run_dir / "export").iterdir()) == ["toy-bf16.gguf", "toy-f16.gguf"]
    assert GGUFReader(run_dir / "export" / "toy-f16.gguf").fields["general.name"].contents() == "toy"
    assert "next:" not in told
    assert "toy-q8_0.gguf" in staged(run_dir, "export.gguf=[f16]", kinds=["q8_0"], dry_run=True)
    assert "toy-q4_k_m.gguf" in staged(run_dir, dry_run=True)


def test_what_full_tuning_left_is_exported_whole(tmp_path):
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("test", "*.jsonl"))
    staged(tmp_path, "method=full", "export.merged=false", "export.gguf=[f16]")
    assert (tmp_path / "export" / "toy-f16.gguf").is_file()


def test_what_is_left_out_is_told(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("test", "*.jsonl"))
    weights = load_file(tmp_path / "model" / "model.safetensors") | {"mtp.layers.0.enorm.weight": torch.ones(4)}
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    told = typed("--model", tmp_path / "model", "--output", tmp_path / "m.gguf", "--dry-run")
    assert "left out: 1 tensors that llama.cpp does not use, such as mtp.layers.0.enorm.weight" in told


def test_an_nf4_run_is_told_which_weights_it_was_merged_onto(run_dir):
    told = staged(run_dir, "model.quantization=nf4", kinds=["f32"])
    assert "the adapter learned beside NF4 weights" in told
