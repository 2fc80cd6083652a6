"""The files for schedulers: run as they are, with stand-ins for what only a cluster has, and read as torchrun and SkyPilot read them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import parse_args

from nemotune.errors import RecipeError
from nemotune.recipe import load
from nemotune.workflow.cluster import Job, skypilot_task, slurm_script

WORDS = ("quickstart", "parallel.nproc=6", "data.train=my rows/it's $HOME.jsonl")
ENDS = "exit 0"
STOPS = 'while [ ! -f "my runs/it/stop" ]; do sleep 0.05; done'


def a_job(run_dir: Path = Path("my runs/it"), **changes) -> Job:
    return Job(**{"recipe": load(WORDS[0], WORDS[1:]), "words": WORDS, "run_dir": run_dir, "nodes": 3, **changes})


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Writes the script, and starts it where srun and scontrol note their words; srun then does as told."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my runs" / "it").mkdir(parents=True)

    def start(text: str, *, srun: str, **environment: str) -> subprocess.Popen[str]:
        (tmp_path / "job.sh").write_text(text)
        (tmp_path / "bin").mkdir(exist_ok=True)
        note = "printf '%s\\0' \"$@\""
        hosts = 'if [ "$1" = show ]; then printf "n7\\nn8\\n"; else printf "%s " "$@" >> scontrol.txt; fi'
        programs = {"srun": f"{note} > srun.part; mv srun.part srun.txt\n{srun}", "scontrol": hosts, "python": f"{note} > srun.txt"}
        for name, does in programs.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{does}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(["bash", "job.sh"], text=True, stdout=subprocess.PIPE, env={**os.environ, "PATH": path, **environment})

    return start


def noted() -> list[str]:
    return Path("srun.txt").read_text().split("\0")[:-1]


SLURM = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_CPUS_ON_NODE": "12"}


@pytest.mark.parametrize(("restarts", "resumed"), [({}, []), ({"SLURM_RESTART_COUNT": "2"}, ["--resume"])])
def test_the_slurm_script_starts_the_recipes_processes_and_a_restart_resumes(cluster, restarts, resumed):
    started = cluster(slurm_script(a_job(), time="1:00:00"), srun=ENDS, **SLURM, **restarts)
    assert started.wait(30) == 0
    words = noted()
    torchrun = parse_args(words[words.index("torch.distributed.run") + 1 :])
    assert int(torchrun.nnodes) * int(torchrun.nproc_per_node) == 6 and torchrun.rdzv_backend == "c10d"
    assert (torchrun.rdzv_endpoint, torchrun.rdzv_id) == ("n7:20041", f"41-{restarts.get('SLURM_RESTART_COUNT', 0)}")
    assert torchrun.module and torchrun.training_script == "nemotune"
    assert torchrun.training_script_args == ["train", *WORDS, "--run-dir", "my runs/it", *resumed]


def test_the_slurm_script_asks_for_what_it_starts(cluster):
    text = slurm_script(a_job(), time="1:00:00")
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {"--nodes=3", "--gpus-per-node=2", "--ntasks-per-node=1", "--requeue", "--time=1:00:00", "--signal=B:USR1@300"} < {*asked}
    assert text.splitlines().index("#SBATCH --requeue") < text.splitlines().index(
        "set -euo pipefail"
    )  # sbatch reads no further than a command


def test_before_its_time_is_up_the_slurm_script_saves_and_queues_itself_again(cluster):
    started = cluster(slurm_script(a_job(), time="1:00:00"), srun=STOPS, **SLURM)
    while not Path("srun.txt").exists() and started.poll() is None:
        time.sleep(0.02)
    started.send_signal(signal.SIGUSR1)
    assert started.wait(30) == 0
    assert Path("my runs/it/stop").exists() and Path("scontrol.txt").read_text() == "requeue 41 "


def test_the_slurm_script_ends_as_its_training(cluster):
    assert cluster(slurm_script(a_job(), time="1:00:00"), srun="exit 2", **SLURM).wait(30) == 2
    assert not Path("scontrol.txt").exists()


def test_the_skypilot_task_starts_the_recipes_processes_and_a_restart_resumes(cluster, tmp_path):
    run_dir = tmp_path / "my runs" / "it"
    task = yaml.safe_load(skypilot_task(a_job(run_dir), gpu="A100-80GB"))
    assert (task["name"], task["num_nodes"], task["resources"]) == ("quickstart", 3, {"accelerators": "A100-80GB:2"})
    for resumed in ([], ["--resume"]):
        ended = cluster(task["run"], srun=ENDS, SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2\n10.0.0.3", SKYPILOT_NODE_RANK="2")
        assert ended.wait(30) == 0
        torchrun = parse_args(noted()[2:])
        assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.node_rank, torchrun.master_addr) == ("3", "2", 2, "10.0.0.1")
        assert torchrun.training_script_args == ["train", *WORDS, "--run-dir", str(run_dir), *resumed]
        (run_dir / "metrics.jsonl").touch()


def test_a_skypilot_run_is_kept_where_machines_go(cluster):
    with pytest.raises(RecipeError, match=r"^--run-dir: got my runs/it, expected a directory on storage that all machines mount"):
        skypilot_task(a_job(), gpu="H100")


def test_nodes_that_do_not_divide_the_processes_are_refused():
    with pytest.raises(RecipeError, match=r"^--nodes: got 4, expected a divisor of parallel.nproc \(6\), .*: 1, 2, 3, 6$"):
        a_job(nodes=4)
    with pytest.raises(RecipeError, match=r"^parallel: got .* for 6 processes"):
        a_job(recipe=load("quickstart", ["parallel.nproc=6", "parallel.shard=4"]))
