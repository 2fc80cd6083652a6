"""The stage `merge`: base + adapter where a model may be written. How tensors are merged is in `nemotune.export`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from rich.console import Console

from nemotune.errors import UnsupportedError
from nemotune.export.merge import plan_merge
from nemotune.export.nf4_difference import nf4_difference
from nemotune.export.tuned import Tuned, open_tuned
from nemotune.recipe import Recipe
from nemotune.workflow.messages import say, size, wrote
from nemotune.workflow.sources import MODEL, Source, is_model, refuse_reading, refuse_replacing, source_of
from nemotune.workflow.writing import written


def merge(
    recipe: Recipe, *, run_dir: Path, output: Path | None, overwrite: bool, dry_run: bool, console: Console, alone: bool = True
) -> None:
    """Write base + adapter of a run as a Hugging Face directory."""
    if recipe.method != "lora":
        raise UnsupportedError(f"method: {recipe.method} leaves a whole model in {run_dir / 'model'}; there is nothing to merge")
    target = output or run_dir / "export" / "merged"
    refuse_replacing(target, "--output", by=is_model, what=MODEL)
    source = source_of(recipe, run_dir, weights=not dry_run)
    if not merge_source(source, target, overwrite=overwrite, dry_run=dry_run, console=console):
        return
    if recipe.model.quantization == "nf4":
        scoring = f"nemotune eval {quote(str(run_dir))} --model {quote(str(target))}"
        say(console, f"{of_nf4(source)}: before it serves, `{scoring}`")
    wrote(console, target, then=f"vllm serve {quote(str(target))}" if alone else None)


def of_nf4(source: Source) -> str:
    """What it means that the adapter learned beside NF4 weights."""
    found = nf4_difference(open_tuned(source.model, source.adapter))
    return (
        f"the adapter learned beside NF4 weights and was merged onto the wide ones, from which they differ by {found.nf4:.1%} (root mean square), "
        f"where the adapter's own change is {found.update:.1%}"
    )


def merge_given(source: Source, target: Path, *, overwrite: bool, dry_run: bool, console: Console) -> None:
    """Write a base and an adapter that no run made as a Hugging Face directory."""
    refuse_replacing(target, "--output", by=is_model, what=MODEL)
    if merge_source(source, target, overwrite=overwrite, dry_run=dry_run, console=console):
        wrote(console, target, then=f"vllm serve {quote(str(target))}")


def merge_source(source: Source, target: Path, *, overwrite: bool, dry_run: bool, console: Console) -> bool:
    """Whether it was merged: a dry run only says what would be."""
    for path in filter(None, (source.model, source.adapter)):
        refuse_reading(path, target, "--output")
    if dry_run and not source.has_weights:
        say(console, f"would download the weights of {source.model} and write {target}")
        return False
    return write_merged(open_tuned(source.model, source.adapter), target, overwrite=overwrite, dry_run=dry_run, console=console)


def write_merged(tuned: Tuned, target: Path, *, overwrite: bool, dry_run: bool, console: Console) -> bool:
    """Whether it was written."""
    plan = plan_merge(tuned)
    told = f"{size(plan.num_bytes)}, {len(tuned.updates)} of {len(tuned.infos)} tensors updated"
    if dry_run:
        say(console, f"would write {target}: {told}")
        return False
    verified = written(plan, target, overwrite=overwrite)
    say(console, f"merged: {told}")
    say(console, f"read back: {verified.updated} updated tensors are base + adapter, {verified.untouched} others have the base's bytes")
    return True
