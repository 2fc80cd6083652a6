"""One contender of train_vs_trl: `nemotune train` itself, as a user runs it. Arguments: a recipe, steps, overrides."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.harness import report
from nemotune.recipe import load
from nemotune.workflow import stages


def main() -> None:
    path, steps, *overrides = sys.argv[1:]
    recipe = load(path, [*overrides, f"train.max_steps={steps}", "train.epochs=10"])
    run_dir = Path(path).with_name("run")
    shutil.rmtree(run_dir, ignore_errors=True)
    stages.train(recipe, run_dir=run_dir, resume=False, overwrite=True, dry_run=False, console=Console(stderr=True))
    rows = [row for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "train"]
    seconds = sum(row["seconds"] for row in rows[1:])
    tokens = sum(row["seconds"] * row["tokens_per_second"] for row in rows[1:])
    report({"tokens_per_second": tokens / seconds, "padding": 0.0, "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"]})


if __name__ == "__main__":
    main()
