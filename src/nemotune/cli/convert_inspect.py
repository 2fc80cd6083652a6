"""`nemotune convert inspect`: what a checkpoint of Megatron-Bridge holds and lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotune.workflow import processes

app = typer.Typer(add_completion=False)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="The checkpoint, of a model or of LoRA; or one iteration of it.")],
    hf: Annotated[str | None, typer.Option("--hf", metavar="DIR", help="The model to compare with; the one it knows of otherwise.")] = None,
) -> None:
    """Say what a Megatron checkpoint holds and what it lacks."""
    processes.require_alone("convert inspect")
    from rich.console import Console

    from nemotune.workflow import converting

    converting.inspect(path, hf=hf, console=Console())
