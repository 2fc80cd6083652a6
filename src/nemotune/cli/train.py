"""`nemotune train`: the training of a recipe alone; its data are prepared first where they are not there."""

from __future__ import annotations

import typer

from nemotune.cli.options import DryRun, Overrides, Overwrite, RecipeName, Resume, RunDir, open_recipe

app = typer.Typer(add_completion=False)


@app.command()
def train(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Train, with checkpoints; save the adapter or the weights."""
    opened = open_recipe(recipe, overrides, run_dir, verb="train")
    from rich.console import Console

    from nemotune.workflow import stages

    stages.train(opened.recipe, run_dir=opened.run_dir, resume=resume, overwrite=overwrite, dry_run=dry_run, console=Console())
