"""`nemotune train parallel.nproc=2` as a person types it: it outlives one of its processes, SIGTERM saves and ends it, one process goes on with it."""

from __future__ import annotations

import json
import os
import signal
import socket
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


def start(words: list[str], directory: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(nemotune.__file__).parent.parent)}
    command = [sys.executable, "-m", *words, "train", "quickstart", *SETTINGS, *CHANGES, "--run-dir", "it"]
    return subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count('"kind": "train"') if metrics.is_file() else 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes as Linux lists them")
def test_a_training_outlives_a_process_is_saved_by_sigterm_and_goes_on_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMOTUNE_CACHE", str(tmp_path / "cache"))
    process, run_dir = start(["nemotune"], tmp_path), tmp_path / "it"
    checkpoints = run_dir / "checkpoints"
    wait_until(lambda: steps(run_dir) >= 2 and any(checkpoints.glob("step_*")), process)
    first = children(process.pid)
    os.kill(first[-1], signal.SIGKILL)
    wait_until(lambda: len(children(process.pid)) == 2 and not {*first} & {*children(process.pid)}, process)
    reached = steps(run_dir)
    wait_until(lambda: steps(run_dir) > reached, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith("stopped at the deadline after ") and err.count("resumed after step ") == 1 and "Traceback" not in err
    assert (checkpoints / f"step_{steps(run_dir):06d}").is_dir() and (tmp_path / "it" / "adapter" / "adapter_model.safetensors").is_file()

    alone = load(str(tmp_path / "it"), ["parallel.nproc=1", f"train.max_steps={steps(run_dir) + 1}"])
    stages.train(alone, resume=True, **options(tmp_path / "it"))
    trained = [row["step"] for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "train"]
    assert trained == list(range(1, alone.train.max_steps + 1))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes as Linux lists them")
def test_two_machines_outlive_a_process_of_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of torchrun's agents with a process each: that of the machine that lost nothing counts no restart, and resumes all the same."""
    monkeypatch.setenv("NEMOTUNE_CACHE", str(tmp_path / "cache"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--local-addr=127.0.0.1", "--rdzv-backend=c10d", "--rdzv-id=it"]
    words = ["torch.distributed.run", *options, f"--rdzv-endpoint={endpoint}", "-m", "nemotune"]
    agents, run_dir = [start(words, tmp_path) for _ in range(2)], tmp_path / "it"
    try:
        wait_until(lambda: steps(run_dir) >= 2 and any((run_dir / "checkpoints").glob("step_*")), agents[0])
        first = {pid for agent in agents for pid in children(agent.pid)}
        [of_rank_1] = [pid for pid in first if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(of_rank_1, signal.SIGKILL)
        wait_until(lambda: not first & {pid for agent in agents for pid in children(agent.pid)}, agents[0])
        reached = steps(run_dir)
        wait_until(lambda: steps(run_dir) > reached, agents[0])
        (run_dir / "stop").touch()
        told = [agent.communicate(timeout=120) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], told
    assert sum(err.count("resumed after step ") for _, err in told) == 1
