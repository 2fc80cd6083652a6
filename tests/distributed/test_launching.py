"""torchrun from within: processes end together, what one has to say is said once, and what only a user can mend is not tried again.

Each worker is a small program without torch; `start` runs in a process of its own, since signals are part of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nemotune

SOURCE = str(Path(nemotune.__file__).parent.parent)
PARENT = """
import sys
from pathlib import Path
from rich.console import Console
from nemotune.cli.main import guarded
from nemotune.workflow.launching import start

sys.argv = ["nemotune", "train"]
guarded(lambda words: start(["worker.py"], nproc=2, launch_dir=Path("launch"), console=Console(stderr=True, soft_wrap=True), max_restarts=1))
print("went on", flush=True)
"""
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
import typer
from nemotune.cli.main import guarded
from nemotune.errors import RecipeError
from nemotune.workflow.processes import end_with_parent, this_process

me, app = this_process(), typer.Typer(pretty_exceptions_enable=False)

@app.command()
def work() -> None:
    names = ("OMP_NUM_THREADS", "MASTER_ADDR")
    note = {"rank": me.rank, "of": me.world_size, "restarts": me.restarts, "dir": str(me.launch_dir), "pid": os.getpid(), **{n: os.environ[n] for n in names}}
    Path(f"note-{me.restarts}-{me.rank}.partial").write_text(json.dumps(note))
    Path(f"note-{me.restarts}-{me.rank}.partial").rename(f"note-{me.restarts}-{me.rank}.json")
    %s

guarded(app)
"""


def begin(work: str, where: Path) -> subprocess.Popen[str]:
    (where / "launch").mkdir()
    (where / "worker.py").write_text(WORKER % work)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | {"PYTHONPATH": SOURCE, "NO_COLOR": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(work: str, where: Path) -> tuple[int, str, str]:
    process = begin(work, where)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def notes(where: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(where.glob("note-*.json"))]


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_processes_know_one_another_and_the_parent_goes_on(tmp_path: Path) -> None:
    code, out, err = ended("sys.stdout.write(f'rank {me.rank}\\n')", tmp_path)
    assert (code, sorted(out.splitlines()), err) == (0, ["rank 0", "rank 1", "went on"], "")
    assert [(note["rank"], note["of"], note["restarts"], note["dir"]) for note in notes(tmp_path)] == [
        (0, 2, 0, "launch"),
        (1, 2, 0, "launch"),
    ]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert {(note["OMP_NUM_THREADS"], note["MASTER_ADDR"]) for note in notes(tmp_path)} == {(str(threads), "127.0.0.1")}


def test_what_a_user_has_to_mend_is_told_once_without_what_it_led_to_and_is_not_tried_again(tmp_path: Path) -> None:
    """Rank 1 ends for a reason of its own; rank 0, even before that is told, for the lost connection."""
    code, _, err = ended("if me.rank == 0: raise RuntimeError('connection closed')\n    time.sleep(0.4)\n    raise RecipeError('lora.rank: got 0')", tmp_path)  # fmt: skip
    assert (code, err) == (2, "Error\n  lora.rank: got 0\n")
    assert {note["restarts"] for note in notes(tmp_path)} == {0}


def test_a_lost_process_is_started_again(tmp_path: Path) -> None:
    lost_once = "if me.restarts == 0 and me.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n    if me.restarts == 0: time.sleep(60)"
    code, out, err = ended(lost_once, tmp_path)
    assert (code, out, err) == (0, "went on\n", "")
    assert {note["restarts"] for note in notes(tmp_path)} == {0, 1}


def test_a_bug_shows_one_traceback_an_attempt(tmp_path: Path) -> None:
    code, _, err = ended("raise KeyError('ours')", tmp_path)
    assert (code, err.count("Traceback"), err.count("KeyError: 'ours'")) == (1, 2, 2)


def test_what_kept_being_killed_is_told_in_words(tmp_path: Path) -> None:
    code, _, err = ended("if me.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n    time.sleep(60)", tmp_path)
    assert code == 128 + signal.SIGKILL
    assert "Traceback" not in err and "(local rank 1) was ended by SIGKILL" in err and "--resume" in err


def test_an_interrupt_is_handed_on_and_told_once(tmp_path: Path) -> None:
    process = begin("time.sleep(60)", tmp_path)
    wait_for(lambda: len(notes(tmp_path)) == 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "Interrupted. The same command with --resume goes on from the last checkpoint of a training run.\n"
    assert not any(_runs(note["pid"]) for note in notes(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends children with their parent, where they ask for it")
def test_no_process_outlives_a_killed_parent(tmp_path: Path) -> None:
    process = begin("end_with_parent()\n    Path(f'asked-{me.rank}').touch()\n    time.sleep(60)", tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("asked-*"))) == 2)
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not any(_runs(note["pid"]) for note in notes(tmp_path)), 10)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
