"""`nemotune convert export`: a checkpoint of Megatron-Bridge as a Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotune.cli.options import DryRun, Overwrite, Verify
from nemotune.workflow import processes

app = typer.Typer(add_completion=False)


@app.command("export")
def export(
    megatron: Annotated[
        Path, typer.Option("--megatron", metavar="DIR", help="The checkpoint, of a model or of LoRA; or one iteration of it.")
    ],
    hf: Annotated[Path, typer.Option("--hf", metavar="DIR", help="The Hugging Face directory to write.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="DIR", help="The model that it comes from: its config, tokenizer, names, dtypes and shards."),
    ] = None,
    verify: Verify = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Write a Megatron checkpoint, or its LoRA merged, as a Hugging Face model."""
    processes.require_alone("convert export")
    from rich.console import Console

    from nemotune.workflow import converting

    converting.to_hf(megatron, hf, base=base, verify=verify, overwrite=overwrite, dry_run=dry_run, console=Console())
