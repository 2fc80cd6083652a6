"""The stage `data`: the recipe's rows to `run_dir/data`. How rows are prepared is in `nemotune.data`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from rich.console import Console

from nemotune.data import preview
from nemotune.data.prepare import Prepared, prepare
from nemotune.data.sources import require_sources
from nemotune.models import load_tokenizer
from nemotune.recipe import Recipe
from nemotune.workflow.messages import say, wrote
from nemotune.workflow.run_dir import is_begun, record


def data(recipe: Recipe, *, run_dir: Path, show: int, overwrite: bool, dry_run: bool, console: Console) -> None:
    """Prepare the rows into `run_dir/data` and show what they became."""
    if dry_run:
        require_sources(recipe)
        say(console, f"would prepare {recipe.data.train.path} into {run_dir / 'data'}")
        return
    prepare_rows(recipe, run_dir, show=show, overwrite=overwrite, console=console)


def prepare_rows(recipe: Recipe, run_dir: Path, *, show: int, overwrite: bool, console: Console, alone: bool = True) -> Prepared:
    """The prepared rows, of which `show` are shown. Where nothing is trained yet, the run directory stands for this recipe from now on."""
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
    prepared = prepare(recipe, tokenizer, out_dir=run_dir / "data", overwrite=overwrite)
    if not is_begun(run_dir):
        record(recipe, run_dir, fingerprint=prepared.fingerprint)
    preview.show(prepared, tokenizer, console, samples=show)
    wrote(console, run_dir / "data", then=f"nemotune train {quote(str(run_dir))}" if alone else None)
    return prepared
