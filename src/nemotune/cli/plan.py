"""`nemotune plan`: memory, disk and steps of a recipe before anything is spent. Writes nothing."""

from __future__ import annotations

import typer

from nemotune.cli.options import Overrides, RecipeName, open_recipe

app = typer.Typer(add_completion=False)


@app.command()
def plan(recipe: RecipeName = "quickstart", overrides: Overrides = None) -> None:
    """Say what a run would train, hold in memory and write."""
    opened = open_recipe(recipe, overrides, verb="plan")
    from rich.console import Console

    from nemotune.workflow import stages
    from nemotune.workflow.messages import say

    console = Console()
    stages.plan(opened.recipe, console=console)
    say(console, f"a run writes {stages.what_run_writes(opened.recipe, opened.run_dir)}")
