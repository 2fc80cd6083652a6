"""Kills one process of a training at a random moment, again and again, and holds what comes out against an undisturbed run, byte for byte.

    python -m scripts.soak --times 20 --nproc 2 --settings parallel.data=2

Each disturbed run is let go to a random step, waits a random part of the next, and sends SIGKILL to a random process. torchrun starts the
processes again, which resume by themselves. Linux only: processes are found in /proc. About a quarter of a minute for each time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 12
SETTINGS = (
    f"train.max_steps={STEPS}", "train.epochs=99", "train.micro_batch_size=1", "train.global_batch_size=4", "train.checkpoint_every=2",
    "train.eval_every=6", "logging.every=1", "logging.trackers=[]", "data.max_samples=60", "data.validation=0.1", "data.test=0.1",
    "data.sequence_length=512", "lora.dropout=0.1", "evaluate.tasks=[]",
)  # fmt: skip


def main() -> None:
    """Exits with 1 where an outcome differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="*", default=[], help="of the recipe, such as parallel.shard=2")
    asked = parser.parse_args()
    chance, different = random.Random(asked.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        calm = _start(Path(folder) / "calm", asked)
        if calm.wait():
            sys.exit(f"the undisturbed run failed:\n{(Path(folder) / 'calm.log').read_text()[-2000:]}")
        expected = _digests(Path(folder) / "calm")
        print(f"undisturbed: {time.time() - start:.0f} s", flush=True)
        for number in range(1, asked.times + 1):
            run_dir, start = Path(folder) / f"run_{number}", time.time()
            told = _disturb(_start(run_dir, asked), run_dir, chance)
            same = _digests(run_dir) == expected
            different += not same
            print(f"{number}: {told}; {time.time() - start:.0f} s; {'identical' if same else 'DIFFERENT'}", flush=True)
    print(f"{asked.times - different} of {asked.times} identical to the undisturbed run")
    sys.exit(different > 0)


def _start(run_dir: Path, asked: argparse.Namespace) -> subprocess.Popen[str]:
    words = ["train", "quickstart", *SETTINGS, f"parallel.nproc={asked.nproc}", *asked.settings, "--run-dir", str(run_dir)]
    with (run_dir.parent / f"{run_dir.name}.log").open("w") as log:
        return subprocess.Popen([sys.executable, "-m", "nemotune", *words], stdout=log, stderr=log, text=True)


def _disturb(training: subprocess.Popen[str], run_dir: Path, chance: random.Random) -> str:
    """Kill one process when a random step has been written; wait for the end of the run."""
    step, log = chance.randrange(1, STEPS), run_dir.parent / f"{run_dir.name}.log"
    while _last_step(run_dir) < step:
        if training.poll() is not None:
            return f"ended with {training.returncode} before step {step}: {log.read_text()[-500:]}"
        time.sleep(0.01)
    time.sleep(chance.random() * 0.3)
    workers = _workers(training.pid)
    if not workers:
        return f"no process was left to kill (exit {training.wait()})"
    rank, victim = chance.choice(sorted(workers.items()))
    os.kill(victim, signal.SIGKILL)
    code = training.wait()
    resumed = [line.rpartition("/")[2] for line in log.read_text().splitlines() if line.startswith("resumed after step")]
    return f"rank {rank} killed after step {step}, {'resumed from ' + ', '.join(resumed) if resumed else 'begun anew'}, exit {code}"


def _last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def _workers(launcher: int) -> dict[int, int]:
    """Rank -> process, of those that the launcher has started."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            variables = dict(entry.partition("=")[::2] for entry in (directory / "environ").read_text().split("\0"))
        except (OSError, ValueError):
            continue  # it has ended meanwhile
        if parent == launcher and "LOCAL_RANK" in variables:
            found[int(variables["LOCAL_RANK"])] = int(directory.name)
    return found


def _digests(run_dir: Path) -> dict[str, str]:
    """Of the weights that the run leaves."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(run_dir.glob("adapter/*.safetensors"))}


if __name__ == "__main__":
    main()
