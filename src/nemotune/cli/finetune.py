"""`finetune`: the short form of `nemotune run glaive-nano-4b`, function calling on a small Nemotron.

    finetune --max-samples 1000 --merge --gguf q4_k_m

Each option is an override of the recipe; what the recipe cannot carry out is refused as `nemotune run` refuses it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from nemotune.cli.main import guarded
from nemotune.cli.options import DryRun, Overrides, Overwrite, Resume, carry_out

RECIPE = "glaive-nano-4b"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def finetune(
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option("--model", help="Another base: a directory or hub id.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Your rows in Glaive's form; with data.format=chat, OpenAI-style messages.")
    ] = None,
    max_samples: Annotated[int | None, typer.Option("--max-samples", min=1, help="Train on so many rows at most.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the merged model beside the adapter.")] = False,
    gguf: Annotated[list[str] | None, typer.Option("--gguf", metavar="TYPE", help="Write GGUF of this type; may be given again.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help=f"Where the run is kept; runs/{RECIPE} otherwise.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune a small Nemotron for function calling: the recipe glaive-nano-4b in one line."""
    started = time.time()
    settings = {"model.path": model, "data.train": data, "data.max_samples": max_samples}
    short = [f"{key}={value}" for key, value in settings.items() if value is not None]
    short += ["export.merged=true"] if merge else []
    short += [f"export.gguf=[{', '.join(gguf)}]"] if gguf else []
    carry_out("run", RECIPE, [*short, *(overrides or ())], output, resume=resume, overwrite=overwrite, dry_run=dry_run, started=started)


def main() -> None:
    """The console script `finetune`."""
    guarded(app)
