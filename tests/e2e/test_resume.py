"""Nothing is lost when the power goes: a killed run continues the very trace of an uninterrupted one."""

from __future__ import annotations

import os
import signal
import time

import torch
from safetensors.torch import load_file

from nemotune.train.metrics import read_metrics

TIMES = ("seconds", "tokens_per_second", "model_tflops", "peak_memory_bytes")


def trace(run_dir):
    """The metrics rows without what a clock measured."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_metrics(run_dir)]


def kill_after(process, run_dir, step):
    """Kill -9 once `step` is in the metrics."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["step"] >= step for row in read_metrics(run_dir)):
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_resume_equals_uninterrupted(nemotune, recipe_file, tmp_path):
    whole = nemotune("train", recipe_file, "name=whole")
    assert whole.returncode == 0, whole.stdout
    killed = nemotune("train", recipe_file, "name=killed", wait=False)
    kill_after(killed, tmp_path / "runs" / "killed", 7)
    rows_at_kill = read_metrics(tmp_path / "runs" / "killed")
    assert 7 <= rows_at_kill[-1]["step"] < 12, "killed in the middle"
    resumed = nemotune("train", recipe_file, "name=killed", "--resume")
    assert resumed.returncode == 0, resumed.stdout
    assert "resumed after step" in resumed.stdout
    assert trace(tmp_path / "runs" / "killed") == trace(tmp_path / "runs" / "whole")
    adapters = [load_file(tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


def test_a_second_start_is_a_choice_and_a_changed_recipe_is_named(nemotune, recipe_file, chat_rows, tmp_path):
    assert nemotune("train", recipe_file, "train.max_steps=4").returncode == 0
    again = nemotune("train", recipe_file, "train.max_steps=4")
    assert again.returncode == 2 and "--resume" in again.stdout and "--overwrite" in again.stdout
    changed = nemotune("train", recipe_file, "train.max_steps=4", "--resume", "train.learning_rate=0.5", "lora.rank=8")
    assert changed.returncode == 2
    assert "train.learning_rate: got 0.5, the run was begun with 0.01" in changed.stdout and "lora.rank" in changed.stdout
    data = nemotune("train", recipe_file, "train.max_steps=4", "--resume", "data.sequence_length=128")
    assert data.returncode == 2 and "data.sequence_length" in data.stdout
    longer = nemotune("train", recipe_file, "train.max_steps=6", "logging.every=2", "--resume")
    assert longer.returncode == 0, longer.stdout
    assert read_metrics(tmp_path / "runs" / "trial")[-1]["step"] == 6


def test_resuming_on_other_rows_is_refused(nemotune, recipe_file, chat_rows, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(chat_rows.read_text())
    settings = (recipe_file, f"data.train={rows}", "train.max_steps=2")
    assert nemotune("train", *settings).returncode == 0
    rows.write_text(chat_rows.read_text().replace("How many", "What"))
    assert nemotune("data", *settings, "--overwrite").returncode == 0
    adapter = (tmp_path / "runs" / "trial" / "adapter" / "adapter_model.safetensors").read_bytes()
    resumed = nemotune("train", *settings, "train.max_steps=4", "--resume")
    assert resumed.returncode == 2 and "the rows, template or tokenizer have changed" in resumed.stdout, resumed.stdout
    assert (tmp_path / "runs" / "trial" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_a_torn_checkpoint_is_passed_over(nemotune, recipe_file, tmp_path):
    assert nemotune("train", recipe_file, "train.max_steps=6", "train.eval_every=null").returncode == 0
    checkpoints = tmp_path / "runs" / "trial" / "checkpoints"
    newest = max(checkpoints.glob("step_*"))
    (newest / "trainer.json").unlink()
    resumed = nemotune("train", recipe_file, "train.max_steps=6", "train.eval_every=null", "--resume")
    assert resumed.returncode == 0 and "resumed after step 3" in resumed.stdout


def test_a_run_that_stopped_early_stays_stopped_and_keeps_the_best_weights(nemotune, recipe_file, tmp_path):
    settings = ("train.max_steps=30", "train.eval_every=1", "train.early_stopping=2", "train.learning_rate=0.5", "train.schedule=constant")
    first = nemotune("train", recipe_file, *settings)
    assert first.returncode == 0 and "stopped early" in first.stdout and "the best weights are kept" in first.stdout, first.stdout
    run_dir = tmp_path / "runs" / "trial"
    losses = [row["loss"] for row in read_metrics(run_dir) if row["kind"] == "eval"]
    assert min(losses[-2:]) > min(losses), "two evaluations without a better one"
    steps, adapter = read_metrics(run_dir)[-1]["step"], (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
    again = nemotune("train", recipe_file, *settings, "--resume")
    assert again.returncode == 0, again.stdout
    assert read_metrics(run_dir)[-1]["step"] == steps
    assert (run_dir / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_memory_settings_may_change_on_resume(nemotune, recipe_file, tmp_path):
    assert nemotune("train", recipe_file, "train.max_steps=3").returncode == 0
    smaller = ("train.max_steps=6", "train.micro_batch_size=1", "train.activation_checkpointing=full", "--resume")
    resumed = nemotune("train", recipe_file, *smaller)
    assert resumed.returncode == 0 and "resumed after step 3" in resumed.stdout, resumed.stdout


def test_evaluating_another_model_than_was_trained_is_refused(nemotune, recipe_file, tmp_path):
    assert nemotune("train", recipe_file, "train.max_steps=2").returncode == 0
    other = nemotune("eval", recipe_file, "data.thinking=true")
    assert other.returncode == 2 and "data.thinking: got True, the run was begun with False" in other.stdout
    assert nemotune("eval", tmp_path / "runs" / "trial").returncode == 0
