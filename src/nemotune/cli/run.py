"""`nemotune run`: a recipe from its first row to its report. The order of the stages is in `workflow/stages.py`."""

from __future__ import annotations

import typer

from nemotune.cli.options import DryRun, Overrides, Overwrite, RecipeName, Resume, RunDir, open_recipe

app = typer.Typer(add_completion=False)


@app.command()
def run(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Do it all: data, plan, train, eval, export, report."""
    opened = open_recipe(recipe, overrides, run_dir, verb="run")
    from rich.console import Console

    from nemotune.workflow import stages

    stages.run(opened.recipe, run_dir=opened.run_dir, resume=resume, overwrite=overwrite, dry_run=dry_run, console=Console())
