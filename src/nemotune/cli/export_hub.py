"""`nemotune export hub`: what a run left, to a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from nemotune.cli.options import DryRun, Overrides, RecipeName, RunDir, open_recipe
from nemotune.workflow import processes

app = typer.Typer(add_completion=False)


@app.command()
def hub(
    repo: Annotated[str, typer.Option("--repo", metavar="OWNER/NAME", help="The repository; made where it is not there.")],
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    run_dir: RunDir = None,
    what: Annotated[str | None, typer.Option("--what", help="adapter, merged, gguf or a directory; what training left otherwise.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="OWNER/NAME", help="The base on the hub, where model.path is a directory.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Refuse to publish where all can see it.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="The branch; made where it is not there.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Commit over other files of the same names.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Publish the tuned model on the Hugging Face hub, with a model card."""
    processes.require_alone("export hub")
    if not sys.stderr.isatty():
        os.environ.setdefault(
            "TQDM_MININTERVAL", "30"
        )  # read when tqdm is first imported: huggingface_hub's bars, a line every half a minute
    opened = open_recipe(recipe, overrides, run_dir, verb="export hub")
    from rich.console import Console

    from nemotune.workflow import publishing

    publishing.hub(
        opened.recipe, run_dir=opened.run_dir, repo=repo, what=what, base=base, private=private, branch=revision, overwrite=overwrite,
        dry_run=dry_run, console=Console(),
    )  # fmt: skip
