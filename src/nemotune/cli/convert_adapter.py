"""`nemotune convert adapter`: an adapter that others wrote, in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotune.cli.options import DryRun, Overwrite
from nemotune.workflow import processes

app = typer.Typer(add_completion=False)


@app.command()
def adapter(
    source: Annotated[Path, typer.Option("--from", help="The adapter: PEFT's form, one tensor per expert, or Megatron-Bridge's.")],
    base: Annotated[str, typer.Option("--base", help="The model that it is for, a directory or hub id: config.json is enough.")],
    reader: Annotated[str, typer.Option("--to", metavar="READER", help="peft, vllm, llama.cpp or megatron.")],
    output: Annotated[Path, typer.Option("--output", help="What to write.")],
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Convert an adapter from one form to another."""
    processes.require_alone("convert adapter")
    from rich.console import Console

    from nemotune.workflow import adapters

    adapters.export(
        source, base, reader=reader, output=output, overwrite=overwrite, dry_run=dry_run, console=Console(), options=("--to", "--base")
    )
