"""`nemotune train parallel.nproc=2` as a person types it: it outlives one of its processes, SIGTERM saves and ends it, one process goes on with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_run import SETTINGS, options

import nemotune
from nemotune.recipe import load
from nemotune.workflow import stages

CHANGES = ("parallel.nproc=2", "train.max_steps=400", "train.epochs=400", "train.checkpoint_every=1", "logging.every=1")


def wait_until(condition, process: subprocess.Popen[str], seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=30)
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes as Linux lists them")
def test_a_training_outlives_a_process_is_saved_by_sigterm_and_goes_on_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMOTUNE_CACHE", str(tmp_path / "cache"))
    environment = {**os.environ, "PYTHONPATH": str(Path(nemotune.__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "nemotune", "train", "quickstart", *SETTINGS, *CHANGES, "--run-dir", "it"], cwd=tmp_path,
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics, checkpoints = tmp_path / "it" / "metrics.jsonl", tmp_path / "it" / "checkpoints"

    def steps() -> int:
        return metrics.read_text().count('"kind": "train"') if metrics.is_file() else 0

    wait_until(lambda: steps() >= 2 and any(checkpoints.glob("step_*")), process)
    first = children(process.pid)
    os.kill(first[-1], signal.SIGKILL)
    wait_until(lambda: len(children(process.pid)) == 2 and not {*first} & {*children(process.pid)}, process)
    reached = steps()
    wait_until(lambda: steps() > reached, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("stopped at the deadline after ") and err.count("resumed after step ") == 1 and "Traceback" not in err
    assert (checkpoints / f"step_{steps():06d}").is_dir() and (tmp_path / "it" / "adapter" / "adapter_model.safetensors").is_file()

    alone = load(str(tmp_path / "it"), ["parallel.nproc=1", f"train.max_steps={steps() + 1}"])
    stages.train(alone, resume=True, **options(tmp_path / "it"))
    trained = [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if row["kind"] == "train"]
    assert trained == list(range(1, alone.train.max_steps + 1))
