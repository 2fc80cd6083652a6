"""The stage `export gguf`: the tuned model as files for llama.cpp. What is in them is in `nemotune.export.gguf`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

from rich.console import Console

from nemotune.errors import ConflictError
from nemotune.export.gguf.names import left_out
from nemotune.export.gguf.plan import Verified, fallback, plan_gguf
from nemotune.export.gguf.types import require_kind
from nemotune.export.stream import Plan
from nemotune.export.tuned import Tuned, open_tuned
from nemotune.files import refuse_target
from nemotune.recipe import Recipe
from nemotune.workflow.merging import of_nf4
from nemotune.workflow.messages import say, size, wrote
from nemotune.workflow.sources import Source, source_of
from nemotune.workflow.writing import written

DEFAULT = ("q4_k_m",)


def gguf(
    recipe: Recipe,
    *,
    run_dir: Path,
    kinds: Sequence[str] = (),
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    console: Console,
    alone: bool = True,
) -> None:
    """Write what a run trained as a file of each of `kinds`, those of the recipe otherwise: base + adapter, or the whole model."""
    kinds = [require_kind(kind) for kind in kinds or recipe.export.gguf or DEFAULT]
    source = source_of(recipe, run_dir, weights=not dry_run)
    export_gguf(source, kinds, output=output or run_dir / "export", overwrite=overwrite, dry_run=dry_run, console=console, alone=alone)
    if recipe.method == "lora" and recipe.model.quantization == "nf4" and not dry_run:
        say(console, f"{of_nf4(source)}: `nemotune merge` and `nemotune eval --model` score that")


def export_gguf(
    source: Source, kinds: Sequence[str], *, output: Path, overwrite: bool, dry_run: bool, console: Console, alone: bool = True
) -> None:
    """Write a file of each kind: NAME-KIND.gguf in the directory `output`, or `output` itself where that is the name of one file."""
    targets = _targets(source.name, kinds, output)
    if not dry_run:
        _refuse(targets, overwrite=overwrite)
    if dry_run and not source.has_weights:
        say(console, f"would download the weights of {source.model} and write {', '.join(map(str, targets.values()))}")
        return
    tuned = open_tuned(source.model, source.adapter)
    for kind, target in targets.items():
        plan = plan_gguf(tuned, kind, name=source.name)
        told = _size(tuned, kind, plan)
        if dry_run:
            say(console, f"would write {target}: {told}")
            continue
        verified = written(plan, target, overwrite=overwrite)
        say(console, f"{target}: {told}\n{_found(verified)}")
    if unused := left_out(tuned):
        say(console, f"left out: {len(unused)} tensors that llama.cpp does not use, such as {unused[0]}")
    if not dry_run:
        wrote(console, target, then=f"llama-server -m {quote(str(target))} --jinja" if alone else None)


def _refuse(targets: Mapping[str, Path], *, overwrite: bool) -> None:
    """Raise ConflictError where one may not be written; where others may, as after an interrupt, with what writes those."""
    left = [kind for kind, target in targets.items() if not target.exists()]
    if not overwrite and 0 < len(left) < len(targets):
        there = ", ".join(str(target) for kind, target in targets.items() if kind not in left)
        others = " ".join(f"--type {kind}" for kind in left)
        raise ConflictError(f"{there}: already exists; {others} writes what is missing, --overwrite all of it anew")
    for target in targets.values():
        refuse_target(target, overwrite=overwrite, is_file=True)


def _targets(name: str, kinds: Sequence[str], output: Path) -> dict[str, Path]:
    """The file of each kind."""
    kinds = tuple(dict.fromkeys(require_kind(kind) for kind in kinds))
    if output.suffix != ".gguf":
        if output.is_file():
            raise ConflictError(f"--output: {output} is a file without .gguf at its end; name a directory, or a file that ends so")
        return {kind: output / f"{name}-{kind}.gguf" for kind in kinds}
    if len(kinds) > 1:
        raise ConflictError(f"--output: got one file, {output}, for {len(kinds)} types; name a directory, or export one type at a time")
    return {kinds[0]: output}


def _size(tuned: Tuned, kind: str, plan: Plan[Verified]) -> str:
    """Bytes and bits per weight, and how much of the model is wider than its type says."""
    wider = fallback(tuned, kind)
    weights_bytes = sum(part.num_bytes for part in plan.files[0].parts[1:])
    text = f"{size(plan.num_bytes)}, {8 * weights_bytes / wider.of:.2f} bits per weight"
    return f"{text}; {wider.share:.1%} of the weights take a wider type, their rows being no multiple of its block" if wider.numel else text


def _found(verified: Verified) -> str:
    return f"read back: {verified.read_back.tensors} tensors, the values of {verified.read_back.sampled}; {verified.run}"
