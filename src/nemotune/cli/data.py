"""`nemotune data`: rows to tokens, with what was dropped and why, and samples to look at."""

from __future__ import annotations

from typing import Annotated

import typer

from nemotune.cli.options import DryRun, Overrides, Overwrite, RecipeName, RunDir, carry_out

app = typer.Typer(add_completion=False)


@app.command()
def data(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Samples to print token by token, trained tokens highlighted.")] = 2,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Prepare the rows and show what is trained on."""
    carry_out("data", recipe, overrides, run_dir, show=show, overwrite=overwrite, dry_run=dry_run)
