"""`nemotune data index`: texts to a dataset in Megatron's form, to pretrain on with `data.format: megatron`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotune.cli.options import DryRun, Overwrite

app = typer.Typer(add_completion=False)


@app.command()
def index(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help="Files or directories of rows with a text, or hub sets.")],
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="A model's directory or hub id, or tiktoken:NAME.")],
    output: Annotated[Path, typer.Option("--output", metavar="PREFIX", help="Writes PREFIX.bin and PREFIX.idx.")],
    text_key: Annotated[str | None, typer.Option("--text-key", help="The field with the text; text or content otherwise.")] = None,
    bos: Annotated[bool, typer.Option("--bos/--no-bos", help="A begin-of-text token before each document.")] = False,
    eos: Annotated[bool, typer.Option("--eos/--no-eos", help="An end-of-text token after each document.")] = True,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Processes; as many as the files are worth otherwise.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Tokenise texts into a dataset to pretrain on: PREFIX.bin and PREFIX.idx."""
    from rich.console import Console

    from nemotune.workflow import indexing

    indexing.index(
        sources, tokenizer=tokenizer, output=output, text_key=text_key, bos=bos, eos=eos, workers=workers, overwrite=overwrite,
        dry_run=dry_run, console=Console(),
    )  # fmt: skip
