"""Running contenders in turn, and keeping what they measured. Each is a command whose last line of output is a JSON object."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
Figures = dict[str, float]


def in_turn(contenders: Mapping[str, Sequence[str]], *, rounds: int) -> dict[str, Figures]:
    """Run every command once a round. The figures are medians over the rounds, of several with the lowest and highest of each as well
    (`<key>_low`, `<key>_high`); `peak_gb` is the process's largest resident size.
    """
    runs: dict[str, list[Figures]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, command in contenders.items():
            print(f"round {number + 1}/{rounds}: {name} ...", file=sys.stderr, flush=True)
            runs[name].append(_run(command))
    return {name: _over_rounds(found) for name, found in runs.items()}


def _over_rounds(runs: list[Figures]) -> Figures:
    figures = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    if len(runs) == 1:
        return figures
    ends = {"low": min, "high": max}
    return figures | {f"{key}_{end}": choose(run[key] for run in runs) for key in runs[0] for end, choose in ends.items()}


def _run(command: Sequence[str]) -> Figures:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=err, text=True).returncode
        out.seek(0), err.seek(0)
        if code:
            raise SystemExit(f"{' '.join(command)}\nended with {code}:\n{err.read()[-3000:]}")
        return json.loads(out.read().splitlines()[-1])


def report(figures: Mapping[str, float]) -> None:
    """A contender's last line: its figures and the largest resident size that it had."""
    print(json.dumps({**figures, "peak_gb": peak_resident_gb()}))


def peak_resident_gb() -> float:
    """Of this program alone, on Linux: `ru_maxrss` begins with the size of the process that started it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def save(name: str, figures: Mapping[str, Any], *, packages: Sequence[str]) -> Path:
    """Write results/NAME.json with the command, the date, the machine and the packages' versions. `table` among them is what docs/performance.md shows."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    words = ("DIR" if Path(word).is_absolute() else word for word in sys.argv[1:])  # no path of this machine
    about = {
        "command": f"python -m benchmarks.{' '.join((name, *words))}", "date": date.today().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}", "versions": {package: metadata.version(package) for package in packages},
    }  # fmt: skip
    path.write_text(json.dumps(about | dict(figures), indent=2) + "\n", encoding="utf-8")
    return path


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, as docs/performance.md shows it."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
