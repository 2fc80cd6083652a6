"""`nemotune merge`: an adapter into its base, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotune.cli.options import Adapter, DryRun, Model, Overrides, Overwrite, RecipeName, RunDir, carry_out, refuse_run
from nemotune.errors import RecipeError
from nemotune.workflow import processes

app = typer.Typer(add_completion=False)


@app.command()
def merge(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    model: Model = None,
    adapter: Adapter = None,
    output: Annotated[Path | None, typer.Option("--output", help="The directory to write; export/merged in the run otherwise.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Merge an adapter into its base, shard by shard."""
    if model is None and adapter is None:
        carry_out("merge", recipe, overrides, run_dir, output=output, overwrite=overwrite, dry_run=dry_run)
        return
    processes.require_alone("merge")
    refuse_run(recipe, overrides, run_dir)
    if adapter is None:
        raise RecipeError("--adapter: missing, expected the adapter to merge into --model")
    from rich.console import Console

    from nemotune.workflow.merging import merge_given
    from nemotune.workflow.sources import source_given

    source, target = source_given(model, adapter, output, weights=not dry_run)
    merge_given(source, target, overwrite=overwrite, dry_run=dry_run, console=Console())
