"""`nemotune convert import`: a Hugging Face model as a checkpoint of Megatron-Bridge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotune.cli.options import DryRun, Overwrite, Verify
from nemotune.workflow import processes

app = typer.Typer(add_completion=False)


@app.command("import")
def import_(
    hf: Annotated[str, typer.Option("--hf", metavar="DIR", help="The model: a Hugging Face directory or hub id.")],
    megatron: Annotated[Path, typer.Option("--megatron", metavar="DIR", help="The checkpoint to write.")],
    verify: Verify = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Write a Hugging Face model as a Megatron checkpoint."""
    processes.require_alone("convert import")
    from rich.console import Console

    from nemotune.workflow import converting

    converting.from_hf(hf, megatron, verify=verify, overwrite=overwrite, dry_run=dry_run, console=Console())
