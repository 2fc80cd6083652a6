"""The verbs `export adapter` and `convert adapter`: an adapter in the form that another program reads, and what to type to have it read there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shlex import quote

from rich.console import Console

from nemotune import assets
from nemotune.errors import ConflictError, RecipeError, UnsupportedError, did_you_mean
from nemotune.export.adapters.gguf_file import plan_for_llama_cpp
from nemotune.export.adapters.opened import Opened, open_adapter
from nemotune.export.adapters.peft_files import plan_for_peft, plan_for_vllm, vllm_max_rank
from nemotune.export.adapters.same_scale import is_same_scale
from nemotune.export.megatron.checkpoint import is_megatron, open_megatron
from nemotune.export.megatron.lora_files import plan_lora
from nemotune.export.stream import Plan
from nemotune.lora.adapter import CONFIG, OUT_PROJ_NOTE
from nemotune.models import locate
from nemotune.recipe import Recipe
from nemotune.workflow.messages import say, size, wrote
from nemotune.workflow.sources import refuse_reading, refuse_replacing, refuse_run_directory, source_of
from nemotune.workflow.writing import written

PLANS: dict[str, Callable[[Opened], Plan[int]]] = {
    "peft": plan_for_peft,
    "vllm": plan_for_vllm,
    "llama.cpp": plan_for_llama_cpp,
    "megatron": plan_lora,
}
ONE_SCALE = ("vllm", "llama.cpp")


def export_of_run(
    recipe: Recipe, *, run_dir: Path, reader: str, output: Path | None, overwrite: bool, dry_run: bool, console: Console
) -> None:
    """Write the adapter of a run as `reader` reads it."""
    if recipe.method != "lora":
        raise UnsupportedError(f"method: {recipe.method} leaves a whole model in {run_dir / 'model'}, and no adapter; serve that")
    source = source_of(recipe, run_dir, weights=False)
    assert source.adapter is not None
    target = output or run_dir / "export" / ("adapter.gguf" if reader == "llama.cpp" else f"adapter-{reader}")
    export(source.adapter, str(source.model), reader=reader, output=target, overwrite=overwrite, dry_run=dry_run, console=console)


def export(
    adapter: Path, base: str, *, reader: str, output: Path, overwrite: bool, dry_run: bool, console: Console,
    options: tuple[str, str] = ("--for", "--model"),
) -> None:  # fmt: skip
    """Write the adapter of the directory `adapter`, whoever made it, as `reader` reads it; `base` is a directory or hub id, of which config.json is enough.

    `options` are those that named reader and base.
    """
    if reader not in PLANS:
        raise RecipeError(f"{options[0]}: got {reader!r}.{did_you_mean(reader, PLANS)} Known: {', '.join(PLANS)}")
    refuse_run_directory(adapter, "--from" if options[0] == "--to" else "--adapter", instead=f"its adapter is {adapter / 'adapter'}")
    if is_megatron(adapter) and not open_megatron(adapter).is_lora:
        raise RecipeError(
            f"{adapter}: is a checkpoint of a model, expected one of LoRA; `nemotune convert export` makes a Hugging Face model of it"
        )
    base_dir = locate(base, weights=False, key=options[1])
    _refuse_target(output, adapter, base_dir)
    opened = open_adapter(adapter, base_dir)
    plan = PLANS[reader](opened)
    told = f"{size(plan.num_bytes)}, {len(opened.adapter.settings)} modules of {opened.base}"
    if dry_run:
        say(console, f"would write {output} for {reader}: {told}")
        return
    read_back = written(plan, output, overwrite=overwrite)
    say(console, f"adapter for {reader}: {told}; {read_back} tensors were read back and hold its values")
    for note in _notes(opened, reader):
        say(console, note)
    wrote(console, output, then=_next(opened, reader, output))


def _notes(opened: Opened, reader: str) -> list[str]:
    notes = []
    if reader in ONE_SCALE and not is_same_scale(opened.adapter):
        notes.append(
            "its modules have ranks or scales of their own: they were written with one of each, the scale of the others multiplied into B"
        )
    if reader == "peft" and any(name.endswith(".mixer.out_proj") for name in opened.adapter.settings):
        notes.append(OUT_PROJ_NOTE)
    return notes


def _next(opened: Opened, reader: str, output: Path) -> str | None:
    if reader == "vllm":
        base = str(assets.resolve(opened.base) or opened.base)  # a built-in model has a name that no one else knows
        serve = f"vllm serve {quote(base)} --enable-lora --lora-modules {quote(f'{output.name}={output}')}"
        return f"{serve} --max-lora-rank {vllm_max_rank(opened.adapter)}"
    if reader == "llama.cpp":
        return f"llama-server -m BASE.gguf --lora {quote(str(output))}"
    if reader == "megatron":
        return f"nemotune convert inspect {quote(str(output))}"
    return f"PeftModel.from_pretrained(base, {str(output)!r})"


def _refuse_target(target: Path, *read: Path) -> None:
    """An adapter takes the place of an adapter, never of anything else, nor of what is read."""
    for path in read:
        refuse_reading(path, target, "--output")
    refuse_replacing(target, "--output", by=_is_adapter, what=f"adapter (no {CONFIG})")
    if target.is_file() and target.suffix != ".gguf":
        raise ConflictError(f"--output: {target} is no GGUF file by its name, so --overwrite does not replace it; name another file")


def _is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file() or (is_megatron(directory) and open_megatron(directory).is_lora)
