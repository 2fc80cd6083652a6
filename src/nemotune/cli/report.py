"""`nemotune report`: one self-contained page from what a run left on disk."""

from __future__ import annotations

import typer

from nemotune.cli.options import Overrides, RecipeName, RunDir, open_recipe

app = typer.Typer(add_completion=False)


@app.command()
def report(recipe: RecipeName = "quickstart", overrides: Overrides = None, run_dir: RunDir = None) -> None:
    """Write report.html from what a run left."""
    opened = open_recipe(recipe, overrides, run_dir, verb="report")
    from rich.console import Console

    from nemotune.workflow import stages

    stages.report(opened.run_dir, console=Console())
