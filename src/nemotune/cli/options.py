"""What the verbs have in common: the recipe argument, overrides, and the options that mean the same in each. Words only, no work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nemotune.recipe import Recipe

__all__ = ["DryRun", "Opened", "Overrides", "Overwrite", "RecipeName", "Resume", "RunDir", "open_recipe"]

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in recipe, a YAML file, or the directory of an earlier run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings on top of the recipe: train.epochs=2 ...")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Where the run is kept; runs/NAME of the recipe otherwise.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left.")]
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
