"""`nemotune export adapter`: an adapter in the form that PEFT, vLLM, llama.cpp or Megatron-Bridge reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotune.cli.options import DryRun, Overrides, Overwrite, RecipeName, RunDir, open_recipe, refuse_run
from nemotune.errors import RecipeError
from nemotune.workflow import processes

app = typer.Typer(add_completion=False)


@app.command()
def adapter(
    reader: Annotated[str, typer.Option("--for", metavar="READER", help="peft, vllm, llama.cpp or megatron.")],
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The base, in place of a run's, a directory or hub id: config.json is enough.")
    ] = None,
    source: Annotated[Path | None, typer.Option("--adapter", help="The adapter, in place of a run's; any form that is read.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="What to write; export/adapter-READER (adapter.gguf) in the run otherwise.")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Write an adapter as PEFT, vLLM, llama.cpp or Megatron reads it."""
    processes.require_alone("export adapter")
    given = {"--model": model, "--adapter": source, "--output": output}
    alone = model is None and source is None
    if not alone and (missing := [option for option, value in given.items() if value is None]):
        raise RecipeError(f"{missing[0]}: --model, --adapter and --output go together, without a recipe")
    if not alone:
        refuse_run(recipe, overrides, run_dir)
    opened = open_recipe(recipe, overrides, run_dir, verb="export adapter") if alone else None
    from rich.console import Console

    from nemotune.workflow import adapters

    console = Console()
    if opened:
        adapters.export_of_run(
            opened.recipe, run_dir=opened.run_dir, reader=reader, output=output, overwrite=overwrite, dry_run=dry_run, console=console
        )
    elif source and model and output:
        adapters.export(source, model, reader=reader, output=output, overwrite=overwrite, dry_run=dry_run, console=console)
