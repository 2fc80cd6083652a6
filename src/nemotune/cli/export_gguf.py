"""`nemotune export gguf`: the tuned model as files for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotune.cli.options import Adapter, DryRun, Model, Overrides, Overwrite, RecipeName, RunDir, carry_out, refuse_run
from nemotune.workflow import processes

app = typer.Typer(add_completion=False)


@app.command()
def gguf(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--type", metavar="TYPE", help="f32, f16, bf16, q8_0, q5_k_m or q4_k_m; may be given again. export.gguf or q4_k_m otherwise."
        ),
    ] = None,
    model: Model = None,
    adapter: Adapter = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="A file, or a directory of NAME-TYPE.gguf; export in the run otherwise.")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Write GGUF files for llama.cpp, straight from base and adapter."""
    if model is None and adapter is None:
        options = {"kinds": kinds or (), "output": output, "overwrite": overwrite, "dry_run": dry_run}
        carry_out("export gguf", recipe, overrides, run_dir, stage="gguf", **options)
        return
    processes.require_alone("export gguf")
    refuse_run(recipe, overrides, run_dir)
    from rich.console import Console

    from nemotune.workflow.exporting import DEFAULT, export_gguf
    from nemotune.workflow.sources import source_given

    source, target = source_given(model, adapter, output, weights=not dry_run)
    export_gguf(source, kinds or DEFAULT, output=target, overwrite=overwrite, dry_run=dry_run, console=Console())
