"""What a user can cause gives one readable block that says what to do, exit code 2, and leaves nothing half-written."""

from __future__ import annotations

import io
import json
import shutil
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotune.errors import DiskFullError
from nemotune.recipe import load
from nemotune.workflow import stages


def refused(result, *words, run_dir=None):
    """Exit code 2, every word in the block, no traceback, nothing begun."""
    assert result.returncode == 2, result.stdout
    assert "Traceback" not in result.stdout
    for word in words:
        assert word in result.stdout, result.stdout
    if run_dir is not None:
        left = [str(path) for path in run_dir.rglob("*") if path.is_file()] if run_dir.exists() else []
        assert not [path for path in left if "partial" in path or "adapter" in path or "metrics" in path], left


def test_a_misspelt_key(nemotune, recipe_file, tmp_path):
    refused(nemotune("run", recipe_file, "train.learning_rat=1"), "train.learning_rat", "learning_rate", run_dir=tmp_path / "runs")


def test_a_missing_file(nemotune, recipe_file, tmp_path):
    refused(nemotune("run", recipe_file, "data.train=nowhere.jsonl"), "nowhere.jsonl", run_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_missing_model(nemotune, recipe_file, tmp_path):
    refused(nemotune("run", recipe_file, "model.path=./nowhere"), "model.path", "nowhere")
    assert not (tmp_path / "runs").exists()


def test_a_target_that_matches_nothing(nemotune, recipe_file, tmp_path):
    result = nemotune("run", recipe_file, "lora.targets=[q_porj, attention]")
    refused(result, "lora.targets", "q_porj", "Did you mean 'q_proj'?", run_dir=tmp_path / "runs")


def test_a_row_that_cannot_be_rendered(nemotune, recipe_file, chat_rows, tmp_path):
    rows = tmp_path / "bad.jsonl"
    rows.write_text(chat_rows.read_text() + json.dumps({"messages": [{"role": "user", "content": "no answer"}]}) + "\n")
    refused(nemotune("train", recipe_file, f"data.train={rows}", "data.max_bad_rows=0"), "data.max_bad_rows", "40")
    assert nemotune("data", recipe_file, f"data.train={rows}", "data.max_bad_rows=0.05").returncode == 0
    stats = json.loads((tmp_path / "runs" / "trial" / "data" / "stats.json").read_text())
    assert stats["sources"]["train"]["bad"] == 1


def broken_model(small_model, tmp_path):
    copy = tmp_path / "broken"
    shutil.copytree(small_model, copy)
    return copy, copy / "model.safetensors"


def test_an_unreadable_shard(nemotune, recipe_file, small_model, tmp_path):
    model, shard = broken_model(small_model, tmp_path)
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(nemotune("train", recipe_file, f"model.path={model}"), "model.safetensors", "cannot be read", run_dir=tmp_path / "runs")


def test_a_missing_shard(nemotune, recipe_file, small_model, tmp_path):
    model, shard = broken_model(small_model, tmp_path)
    shard.unlink()
    refused(nemotune("train", recipe_file, f"model.path={model}"), "model.safetensors", run_dir=tmp_path / "runs")


def test_a_wrong_shaped_tensor(nemotune, recipe_file, small_model, tmp_path):
    model, shard = broken_model(small_model, tmp_path)
    tensors = load_file(shard)
    name = "backbone.layers.2.mixer.q_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, shard)
    refused(nemotune("train", recipe_file, f"model.path={model}"), name, "got shape (31, 32), expected (32, 32)", run_dir=tmp_path / "runs")


def test_a_full_disk(nemotune, recipe_file, small_disk, tmp_path):
    """On a real small disk: too small for a checkpoint."""
    (tmp_path / "runs").symlink_to(small_disk(600_000))
    result = nemotune("train", recipe_file, "lora.rank=16")
    assert result.returncode == 2 and "Traceback" not in result.stdout, result.stdout
    assert "runs/trial/checkpoints/step_00000" in result.stdout and "the disk is full" in result.stdout


def test_a_disk_that_fills_under_any_file_is_told_and_the_run_goes_on(recipe_file, small_disk, tmp_path, monkeypatch, capfd):
    """The first run says what lies before each file; then a disk ends there, and grows again."""
    monkeypatch.setenv("NEMOTUNE_CACHE", str(tmp_path / "cache"))
    recipe = load(recipe_file, ["train.max_steps=2", "train.checkpoint_every=null", "train.eval_every=null"])

    def train(disk: Path, *, resume: bool = False) -> dict[str, Tensor]:
        stages.train(recipe, run_dir=disk / "run", resume=resume, overwrite=False, dry_run=False, console=Console(file=io.StringIO()))
        return load_file(disk / "run" / "adapter" / "adapter_model.safetensors")

    disk = small_disk(2**26)
    adapter = train(disk)
    files = sorted((path for path in disk.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    before = dict(zip(files, accumulate(path.stat().st_blocks * 512 for path in [disk, *files]), strict=False))
    told = set()
    for path in files:
        small_disk(before[path])
        with pytest.raises(DiskFullError) as error:
            train(disk)
        told |= {*Path(str(error.value).partition(":")[0]).relative_to(disk / "run").parts[:1]}
        left = [str(path.relative_to(disk / "run")) for path in disk.rglob("*") if path.is_file()]
        assert not [path for path in left if "partial" in path or path.startswith("adapter")], left
        small_disk(2**26, change=True)
        again = train(disk, resume=True)
        assert all(torch.equal(tensor, again[name]) for name, tensor in adapter.items())
    assert told == {"data", "recipe.json", "environment.json", "coverage.json", "metrics.jsonl", "checkpoints", "adapter"}
    assert "Traceback" not in capfd.readouterr().err
