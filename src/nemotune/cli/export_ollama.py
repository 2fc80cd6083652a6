"""`nemotune export ollama`: a tuned model as a GGUF file and the Modelfile that Ollama makes a model of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotune.cli.options import Adapter, DryRun, Model, Overrides, Overwrite, RecipeName, RunDir, open_recipe, refuse_run
from nemotune.errors import RecipeError
from nemotune.workflow import processes

app = typer.Typer(add_completion=False)


@app.command()
def ollama(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    kind: Annotated[str, typer.Option("--type", help="f32, f16, bf16, q8_0, q5_k_m or q4_k_m.")] = "q4_k_m",
    model: Model = None,
    adapter: Adapter = None,
    gguf: Annotated[Path | None, typer.Option("--gguf", metavar="FILE", help="A GGUF file that is there, in place of a run.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="The directory to write; export/ollama in the run otherwise.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Write a GGUF file and a Modelfile with the prompts and stop tokens that the model was tuned on."""
    processes.require_alone("export ollama")
    if (adapter and not model) or (model and gguf) or ((model or gguf) and not output):
        raise RecipeError("--model [--adapter] or --gguf name what is exported in place of a run: one of the two, with --output")
    if model or gguf:
        refuse_run(recipe, overrides, run_dir, option="--model" if model else "--gguf")
    opened = None if model or gguf else open_recipe(recipe, overrides, run_dir, verb="export ollama")
    from rich.console import Console

    from nemotune.workflow import ollama as workflow
    from nemotune.workflow.sources import source_given

    console = Console()
    if opened:
        workflow.of_run(
            opened.recipe, run_dir=opened.run_dir, kind=kind, output=output, overwrite=overwrite, dry_run=dry_run, console=console
        )  # fmt: skip
    elif gguf and output:
        workflow.of_file(gguf, target=output, overwrite=overwrite, dry_run=dry_run, console=console)
    else:
        source, target = source_given(model, adapter, output, weights=not dry_run)
        workflow.of_model(source, kind=kind, target=target, overwrite=overwrite, dry_run=dry_run, console=console)
