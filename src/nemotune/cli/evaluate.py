"""`nemotune eval`: the tuned model of a run against its base on the held-out rows, or one model alone."""

from __future__ import annotations

from typing import Annotated

import typer

from nemotune.cli.options import DryRun, Overrides, Overwrite, RecipeName, RunDir, carry_out

app = typer.Typer(add_completion=False)


@app.command("eval")
def evaluate(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Score this model alone, before tuning or merged: a directory or hub id.")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Score the tuned model and its base on held-out rows."""
    if model is not None:
        carry_out("eval", recipe, overrides, run_dir, stage="score", model=model, overwrite=overwrite, dry_run=dry_run)
        return
    carry_out("eval", recipe, overrides, run_dir, stage="evaluate", overwrite=overwrite, dry_run=dry_run)
