"""What the verbs have in common: the recipe argument, the options that mean the same in each, and the way to their stage. No work."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotune.workflow import processes

if TYPE_CHECKING:
    from nemotune.recipe import Recipe

__all__ = [
    "Adapter",
    "DryRun",
    "Model",
    "Opened",
    "Overrides",
    "Overwrite",
    "RecipeName",
    "Resume",
    "RunDir",
    "Verify",
    "carry_out",
    "open_recipe",
    "refuse_run",
    "training_verb",
]

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in recipe, a YAML file, or the directory of an earlier run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings on top of the recipe: train.epochs=2 ...")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Where the run is kept; runs/NAME of the recipe otherwise.")]
Model = Annotated[str | None, typer.Option("--model", help="A model's directory or hub id, in place of a run's.")]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="The adapter on --model.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left.")]
Verify = Annotated[bool, typer.Option("--verify", help="Read back and compare every tensor, not a sample.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and written; write nothing.")]


@dataclass(frozen=True)
class Opened:
    """A recipe that the code can carry out, and the directory of its run."""

    recipe: Recipe
    run_dir: Path


def open_recipe(name: str, overrides: list[str] | None, run_dir: Path | None = None, *, verb: str) -> Opened:
    """Load the recipe and refuse what `verb` cannot carry out. Raises RecipeError, MissingFileError, UnsupportedError."""
    from nemotune import recipe as recipes
    from nemotune.recipe import support

    recipe = recipes.load(name, overrides or ())
    support.check(recipe, verb=verb)
    earlier = Path(name) if Path(name, "recipe.json").is_file() else None
    return Opened(recipe=recipe, run_dir=run_dir or earlier or recipe.run_dir)


def refuse_run(name: str, overrides: list[str] | None, run_dir: Path | None, *, option: str = "--model") -> None:
    """A model that is named takes the place of a run. Raises RecipeError where a run is named as well, which would be left out without a word."""
    from nemotune.errors import RecipeError

    if named := [*([name] if name != "quickstart" else []), *(overrides or ()), *(["--run-dir"] if run_dir else [])]:
        raise RecipeError(
            f"{option}: got {' '.join(named)} as well, expected a run or a model; leave one out (--output names what is written)"
        )


def carry_out(verb: str, name: str, overrides: list[str] | None, run_dir: Path | None, *, stage: str = "", **options: Any) -> None:
    """Open the recipe and call the stage of `nemotune.workflow` that bears the verb's name, or `stage`."""
    if verb != "train":
        processes.require_alone(verb)
    opened = open_recipe(name, overrides, run_dir, verb=verb)
    from rich.console import Console

    from nemotune.workflow import stages

    getattr(stages, stage or verb)(opened.recipe, run_dir=opened.run_dir, console=Console(), **options)


def training_verb(verb: str, summary: str) -> typer.Typer:
    """The command of a verb that trains."""
    app = typer.Typer(add_completion=False)

    @app.command(verb, help=summary)
    def _train(
        recipe: RecipeName = "quickstart",
        overrides: Overrides = None,
        run_dir: RunDir = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
        dry_run: DryRun = False,
    ) -> None:
        carry_out(verb, recipe, overrides, run_dir, resume=resume, overwrite=overwrite, dry_run=dry_run, started=time.time())

    return app
