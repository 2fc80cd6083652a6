"""The verbs `convert import`, `convert export` and `convert inspect`: models between Hugging Face and Megatron. The work is in `nemotune.export.megatron`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from rich.console import Console

from nemotune.errors import MissingFileError
from nemotune.export.megatron.checkpoint import MegatronCheckpoint, is_megatron, open_megatron
from nemotune.export.megatron.fitting import Compared
from nemotune.export.megatron.inspect import inspect as inspect_files
from nemotune.export.megatron.lora import read_lora
from nemotune.export.megatron.to_hf import open_export
from nemotune.export.megatron.to_megatron import plan_import
from nemotune.export.stream import Plan
from nemotune.export.tuned import open_tuned
from nemotune.models import locate
from nemotune.workflow.merging import write_merged
from nemotune.workflow.messages import say, size, wrote
from nemotune.workflow.sources import MODEL, is_model, refuse_reading, refuse_replacing
from nemotune.workflow.writing import written


def from_hf(hf: str, megatron: Path, *, verify: bool, overwrite: bool, dry_run: bool, console: Console) -> None:
    """Write a Hugging Face model as a checkpoint of Megatron-Bridge."""
    refuse_replacing(megatron, "--megatron", by=is_megatron, what="checkpoint of Megatron-Bridge")
    source = locate(hf, weights=not dry_run, key="--hf")
    refuse_reading(source, megatron, "--megatron")
    if dry_run and not any(source.glob("*.safetensors")):
        say(console, f"would download the weights of {hf} and write {megatron}")
        return
    plan = plan_import(open_tuned(source), verify_all=verify)
    if _carried_out(plan, megatron, overwrite=overwrite, dry_run=dry_run, console=console):
        wrote(console, megatron, then=f"nemotune convert inspect {quote(str(megatron))}")


def to_hf(megatron: Path, hf: Path, *, base: str | None, verify: bool, overwrite: bool, dry_run: bool, console: Console) -> None:
    """Write a checkpoint of Megatron-Bridge as a Hugging Face model: its weights, or its LoRA merged into the base."""
    refuse_replacing(hf, "--hf", by=is_model, what=MODEL)
    checkpoint = open_megatron(megatron)
    base_dir = locate(base, key="--base") if base else None
    for source in (checkpoint.directory, *([base_dir] if base_dir else [])):
        refuse_reading(source, hf, "--hf")
    if checkpoint.is_lora:
        _merge(checkpoint, hf, base_dir, overwrite=overwrite, dry_run=dry_run, console=console)
    else:
        export = open_export(checkpoint, base_dir)
        plan = export.plan(verify_all=verify)
        if not _carried_out(plan, hf, overwrite=overwrite, dry_run=dry_run, console=console):
            return
        for note in export.notes:
            say(console, note)
    if not dry_run:
        wrote(console, hf, then=f"vllm serve {quote(str(hf))}")


def inspect(path: Path, *, hf: str | None, console: Console) -> None:
    """Say what a checkpoint of Megatron-Bridge holds and lacks."""
    found = inspect_files(path, locate(hf, weights=False, key="--hf") if hf else None)
    provider = str(found.checkpoint.model.get("_target_", "")).rpartition(".")[2]
    say(console, f"{found.checkpoint.directory}: iteration {found.checkpoint.iteration}{f', {provider}' * bool(provider)}")
    cells = [(row.name, f"{row.count} x", " x ".join(map(str, row.shape)), row.dtype, size(row.num_bytes)) for row in found.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        say(console, "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    say(
        console,
        f"{len(found.checkpoint.weights)} tensors, {size(found.num_bytes)}; {len(found.checkpoint.stored.objects)} other entries",
    )
    if found.model:
        say(console, f"compared with {found.model}")
    for fact in found.facts:
        say(console, fact)
    for problem in found.problems:
        console.print(problem, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _merge(checkpoint: MegatronCheckpoint, hf: Path, base_dir: Path | None, *, overwrite: bool, dry_run: bool, console: Console) -> None:
    if base_dir is None:
        raise MissingFileError(
            f"{checkpoint.directory}: is a LoRA checkpoint, without a model; name the one that it was trained on with --base"
        )
    tuned = open_tuned(base_dir, checkpoint.directory, read=read_lora)
    write_merged(tuned, hf, overwrite=overwrite, dry_run=dry_run, console=console)


def _carried_out(plan: Plan[Compared], target: Path, *, overwrite: bool, dry_run: bool, console: Console) -> bool:
    """Whether it was: a dry run only says what would be."""
    told = f"{size(plan.num_bytes)} in {len(plan.files)} file{'s' * (len(plan.files) > 1)}"
    if dry_run:
        say(console, f"would write {target}: {told}")
        return False
    compared = written(plan, target, overwrite=overwrite)
    say(console, f"written: {told}")
    read_back = f"all {compared.of} tensors" if compared.whole else f"parts of {compared.tensors} of {compared.of} tensors"
    more = "" if compared.whole else "; --verify compares all"
    say(console, f"read back and mapped the other way: {read_back} are the source's, bit for bit{more}")
    return True
