"""What commands take, seen from outside: a contender of several programs is measured as one of ours is. It imports nothing large itself."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import ROOT, Figures

POLL_SECONDS = 0.02


def watched(commands: Sequence[Sequence[str]], work: Path, *, env: dict[str, str] | None = None) -> Figures:
    """Run the commands one after the other: seconds, CPU seconds, the largest peak of memory among them, and the most that `work` held.

    Raises SystemExit with the end of what a command said where it fails.
    """
    most, over = [0], threading.Event()
    poll = threading.Thread(target=_poll, args=(work, most, over))
    poll.start()
    peaks, cpu, started = [], 0.0, time.perf_counter()
    try:
        for command in commands:
            usage = _run(command, env)
            peaks.append(usage.ru_maxrss * 1024)
            cpu += usage.ru_utime + usage.ru_stime
    finally:
        seconds = time.perf_counter() - started
        over.set()
        poll.join()
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_gb": max(peaks) / 1e9, "disk_gb": most[0] / 1e9}


def _run(command: Sequence[str], env: dict[str, str] | None):
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{said.decode(errors='replace')[-3000:]}")
    return usage


def _poll(work: Path, most: list[int], over: threading.Event) -> None:
    while not over.wait(POLL_SECONDS):
        most[0] = max(most[0], _size(work))


def _size(directory: Path) -> int:
    total = 0
    for file in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total
