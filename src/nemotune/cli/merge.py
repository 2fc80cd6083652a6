"""`nemotune merge`: a run's adapter into its base, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotune.cli.options import DryRun, Overrides, Overwrite, RecipeName, RunDir, carry_out

app = typer.Typer(add_completion=False)


@app.command()
def merge(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    output: Annotated[Path | None, typer.Option("--output", help="The directory to write; export/merged in the run otherwise.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Merge the adapter into the base, shard by shard."""
    carry_out("merge", recipe, overrides, run_dir, output=output, overwrite=overwrite, dry_run=dry_run)
