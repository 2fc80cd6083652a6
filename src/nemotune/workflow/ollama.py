"""The verb `export ollama`: a tuned model as Ollama takes it. What the Modelfile says is in `nemotune.export.ollama`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from rich.console import Console

from nemotune.data.progress import progress
from nemotune.errors import MissingFileError
from nemotune.export.ollama import MODELFILE, modelfile, plan_ollama, served
from nemotune.export.stream import write
from nemotune.export.tuned import Tuned, open_tuned
from nemotune.files import atomic_file, refuse_target
from nemotune.models import locate
from nemotune.recipe import Recipe
from nemotune.workflow.messages import say, wrote
from nemotune.workflow.run_dir import require_same_model


def of_run(recipe: Recipe, *, run_dir: Path, kind: str, output: Path | None, overwrite: bool, dry_run: bool, console: Console) -> None:
    """Write what the run trained: base and adapter, or the whole model."""
    trained = run_dir / ("adapter" if recipe.method == "lora" else "model")
    if not trained.is_dir():
        raise MissingFileError(f"{trained}: nothing trained yet; `nemotune train` comes first")
    if (run_dir / "recipe.json").is_file():
        require_same_model(recipe, run_dir)
    base, adapter = (locate(recipe.model.path, recipe.model.revision), trained) if recipe.method == "lora" else (trained, None)
    target = output or run_dir / "export" / "ollama"
    of_model(base, adapter, name=recipe.name, kind=kind, target=target, overwrite=overwrite, dry_run=dry_run, console=console)


def of_model(
    directory: Path, adapter: Path | None, *, name: str | None, kind: str, target: Path, overwrite: bool, dry_run: bool, console: Console
) -> None:
    """Write the model in `directory`, with `adapter` on top of it, as a GGUF file and its Modelfile."""
    tuned: Tuned = open_tuned(directory, adapter)
    plan = plan_ollama(tuned, kind, name=name)
    if dry_run:
        say(console, f"would write {target}: {plan.num_bytes / 1e9:.2f} GB and {MODELFILE}")
        return
    with progress("writing", total=plan.num_bytes) as advance:
        verified = write(plan, target, overwrite=overwrite, done=advance)
    say(console, str(verified.run))
    _end(console, target, name)


def of_file(gguf: Path, *, target: Path, overwrite: bool, dry_run: bool, console: Console) -> None:
    """Write a Modelfile for a GGUF file that is there."""
    if not gguf.is_file():
        raise MissingFileError(f"--gguf: {gguf} is not there; `nemotune export gguf` makes one")
    text = modelfile(served(gguf), source=str(gguf.resolve()), generation={}, license_text=None)
    path = target / MODELFILE
    if dry_run:
        say(console, f"would write {path}:\n\n{text}")
        return
    refuse_target(path, overwrite=overwrite, is_file=True)
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")
    _end(console, target, gguf.stem)


def _end(console: Console, target: Path, name: str | None) -> None:
    created = (name or target.resolve().name).lower()
    wrote(console, target / MODELFILE, then=f"ollama create {quote(created)} -f {quote(str(target / MODELFILE))}")
