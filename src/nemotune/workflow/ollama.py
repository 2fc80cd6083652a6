"""The verb `export ollama`: a tuned model as Ollama takes it. What the Modelfile says is in `nemotune.export.ollama`."""

from __future__ import annotations

import re
from pathlib import Path
from shlex import quote

from rich.console import Console

from nemotune.errors import MissingFileError
from nemotune.export.ollama import MODELFILE, modelfile, plan_ollama, served
from nemotune.export.tuned import open_tuned
from nemotune.files import atomic_file, refuse_target
from nemotune.recipe import Recipe
from nemotune.workflow.messages import say, size, wrote
from nemotune.workflow.sources import Source, source_of
from nemotune.workflow.writing import written


def of_run(recipe: Recipe, *, run_dir: Path, kind: str, output: Path | None, overwrite: bool, dry_run: bool, console: Console) -> None:
    """Write what the run trained: base and adapter, or the whole model."""
    source = source_of(recipe, run_dir, weights=not dry_run)
    target = output or run_dir / "export" / "ollama"
    of_model(source, kind=kind, target=target, overwrite=overwrite, dry_run=dry_run, console=console)


def of_model(source: Source, *, kind: str, target: Path, overwrite: bool, dry_run: bool, console: Console) -> None:
    """Write the model and the adapter on it as a GGUF file and its Modelfile."""
    if dry_run and not source.has_weights:
        say(console, f"would download the weights of {source.model} and write {target}")
        return
    tuned = open_tuned(source.model, source.adapter)
    plan = plan_ollama(tuned, kind, name=source.name)
    if dry_run:
        say(console, f"would write {target}: {size(plan.num_bytes)} and {MODELFILE}")
        return
    verified = written(plan, target, overwrite=overwrite)
    say(console, str(verified.run))
    _end(console, target, source.name)


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


def _end(console: Console, target: Path, name: str) -> None:
    """Ollama's names have letters, digits, '.', '-' and '_'."""
    tag = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "tuned"
    wrote(console, target / MODELFILE, then=f"ollama create {tag} -f {quote(str(target / MODELFILE))}")
