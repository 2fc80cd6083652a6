"""`nemotune eval`: the tuned model of a run against its base, on the held-out rows."""

from __future__ import annotations

import typer

from nemotune.cli.options import DryRun, Overrides, Overwrite, RecipeName, RunDir, carry_out

app = typer.Typer(add_completion=False)


@app.command("eval")
def evaluate(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Score the tuned model and its base on held-out rows."""
    carry_out("eval", recipe, overrides, run_dir, stage="evaluate", overwrite=overwrite, dry_run=dry_run)
