"""`nemotune eval`: the tuned model of a run against its base, on the held-out rows."""

from __future__ import annotations

import typer

from nemotune.cli.options import DryRun, Overrides, Overwrite, RecipeName, RunDir, open_recipe

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
    opened = open_recipe(recipe, overrides, run_dir, verb="eval")
    from rich.console import Console

    from nemotune.workflow import stages

    stages.evaluate(opened.recipe, run_dir=opened.run_dir, overwrite=overwrite, dry_run=dry_run, console=Console())
