"""What a user can cause gives one readable block that says what to do, exit code 2, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
from safetensors.torch import load_file, save_file


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


@pytest.mark.parametrize("size", ["150k", "700k"])
def test_a_full_disk(nemotune, recipe_file, tmp_path, size):
    """On a real small disk: too small for the prepared data, then too small for a checkpoint."""
    disk = tmp_path / "runs"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        result = nemotune("train", recipe_file, "lora.rank=16")
        assert result.returncode == 2 and "Traceback" not in result.stdout, result.stdout
        assert "the disk is full" in result.stdout or "are needed" in result.stdout
        assert not list(disk.rglob("*partial*")) and not list(disk.rglob("adapter_model.safetensors"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
