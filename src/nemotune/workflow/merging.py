"""The stage `merge`: base + adapter where a model may be written. How tensors are merged is in `nemotune.export`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from rich.console import Console

from nemotune.data.progress import progress
from nemotune.errors import ConflictError, MissingFileError, UnsupportedError
from nemotune.export.merge import plan_merge
from nemotune.export.stream import write
from nemotune.export.tuned import open_tuned
from nemotune.models import locate
from nemotune.recipe import Recipe
from nemotune.workflow.messages import say, wrote
from nemotune.workflow.run_dir import require_same_model


def merge(
    recipe: Recipe, *, run_dir: Path, output: Path | None, overwrite: bool, dry_run: bool, console: Console, alone: bool = True
) -> None:
    """Write base + adapter as a Hugging Face directory."""
    if recipe.method != "lora":
        raise UnsupportedError(f"method: {recipe.method} leaves a whole model in {run_dir / 'model'}; there is nothing to merge")
    adapter, target = run_dir / "adapter", output or run_dir / "export" / "merged"
    if not adapter.is_dir():
        raise MissingFileError(f"{adapter}: nothing trained yet; `nemotune train` comes first")
    if (run_dir / "recipe.json").is_file():
        require_same_model(recipe, run_dir)
    _refuse_target(target)
    base = locate(recipe.model.path, recipe.model.revision, weights=not dry_run)
    if base.resolve().is_relative_to(target.resolve()):
        raise ConflictError(f"--output: {target} holds the base, which --overwrite does not replace; name another directory")
    if dry_run and not any(base.glob("*.safetensors")):
        say(console, f"would download the weights of {recipe.model.path} and write {target}")
        return
    tuned = open_tuned(base, adapter)
    plan = plan_merge(tuned)
    size = f"{plan.num_bytes / 1e9:.2f} GB, {len(tuned.updates)} of {len(tuned.infos)} tensors updated"
    if dry_run:
        say(console, f"would write {target}: {size}")
        return
    with progress("merging", total=plan.num_bytes, in_bytes=True) as advance:
        verified = write(plan, target, overwrite=overwrite, done=advance)
    say(console, f"merged: {size}")
    say(console, f"read back: {verified.updated} updated tensors are base + adapter, {verified.untouched} others have the base's bytes")
    if recipe.model.quantization == "nf4":
        scoring = f"nemotune eval {quote(str(run_dir))} --model {quote(str(target))}"
        say(console, f"the adapter learned beside NF4 weights and was merged onto the wide ones: before it serves, `{scoring}`")
    wrote(console, target, then=f"vllm serve {quote(str(target))}" if alone else None)


def _refuse_target(target: Path) -> None:
    """A merged model takes the place of a model, never of anything else, whatever the options."""
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise ConflictError(
            f"--output: {target} holds no model (no config.json), so --overwrite does not replace it; name another directory"
        )
