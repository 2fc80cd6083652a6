"""LoRA over NF4 beside LoRA over the wide base: the same rows, seed and steps, and what the held-out loss does.

    python -m benchmarks.four_bits [RECIPE]

The built-in quickstart unless another recipe is named; it needs a validation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.harness import in_turn, report, save, table
from nemotune.recipe import load
from nemotune.workflow import stages


def main() -> None:
    recipe = next((word for word in sys.argv[1:] if word not in ("none", "nf4")), "quickstart")
    if sys.argv[-1] in ("none", "nf4"):
        report(held_out_losses(recipe, sys.argv[-1]))
        return
    figures = in_turn({name: [sys.executable, "-m", "benchmarks.four_bits", recipe, name] for name in ("none", "nf4")}, rounds=1)
    path = save("four_bits", {"figures": figures, "table": show(figures)}, packages=("torch", "transformers"))
    print(show(figures))
    print(f"wrote {path}", file=sys.stderr)


def held_out_losses(name: str, quantization: str) -> dict[str, float]:
    """Train, and return the validation loss by step."""
    recipe = load(name, [f"model.quantization={quantization}"])
    run_dir = Path("runs") / "benchmarks" / f"four-bits-{quantization}"
    stages.train(recipe, run_dir=run_dir, resume=False, overwrite=True, dry_run=False, console=Console(stderr=True))
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {f"step {row['step']}": row["loss"] for row in rows if row["kind"] == "eval"}


def show(figures: dict[str, dict[str, float]]) -> str:
    """Held-out loss by step, a line for each base."""
    steps = [key for key in figures["none"] if key.startswith("step")]
    names = {"none": "bf16 base", "nf4": "NF4 base"}
    return table(("held-out loss", *steps), [(names[name], *(f"{found[step]:.4f}" for step in steps)) for name, found in figures.items()])


if __name__ == "__main__":
    main()
