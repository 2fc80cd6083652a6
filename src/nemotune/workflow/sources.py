"""What an export begins with, and what it may not write over. The exports themselves are in `merging.py`, `exporting.py` and their neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemotune.errors import ConflictError, MissingFileError, RecipeError
from nemotune.export.megatron.checkpoint import is_megatron
from nemotune.lora.adapter import CONFIG
from nemotune.models import locate
from nemotune.recipe import Recipe
from nemotune.workflow.run_dir import require_same_model


@dataclass(frozen=True)
class Source:
    """The model in a directory, the adapter on it, and the name of both together."""

    name: str
    model: Path
    adapter: Path | None

    @property
    def has_weights(self) -> bool:
        """Whether they are here: before they are downloaded, the small files alone are."""
        return any(self.model.glob("*.safetensors"))


def source_of(recipe: Recipe, run_dir: Path, *, weights: bool = True) -> Source:
    """What the run trained; without `weights`, of a base on the hub only the small files are downloaded. Raises MissingFileError, ConflictError."""
    trained = run_dir / ("adapter" if recipe.method == "lora" else "model")
    if not trained.is_dir():
        raise MissingFileError(f"{trained}: nothing trained yet; `nemotune train` comes first")
    if (run_dir / "recipe.json").is_file():
        require_same_model(recipe, run_dir)
    if recipe.method == "lora":
        return Source(recipe.name, locate(recipe.model.path, recipe.model.revision, weights=weights), trained)
    return Source(recipe.name, trained, None)


def source_given(model: str | None, adapter: Path | None, output: Path | None, *, weights: bool = True) -> tuple[Source, Path]:
    """What --model, --adapter and --output name in place of a run. Raises RecipeError where one is missing, or is another's."""
    if model is None or output is None:
        raise RecipeError(f"{'--model' if model is None else '--output'}: --model and --output go together, with or without --adapter")
    directory = locate(model, weights=weights, key="--model")
    for option, path in (("--model", directory), *([("--adapter", adapter)] if adapter else [])):
        refuse_run_directory(path, option, instead="name it without --model and --adapter, to have what it trained")
    if (directory / CONFIG).is_file() and not is_model(directory):
        raise RecipeError(f"--model: {directory} is an adapter; name it with --adapter, and its base with --model")
    if adapter and is_megatron(adapter):
        raise RecipeError(
            f"--adapter: {adapter} is a checkpoint of Megatron-Bridge; `nemotune convert export` merges its LoRA, "
            "`nemotune convert adapter` makes it an adapter that is read here"
        )
    return Source((adapter or Path(model)).resolve().name, directory, adapter), output


def refuse_run_directory(path: Path, option: str, *, instead: str) -> None:
    """Raise RecipeError where a model or an adapter is expected and a run's directory is named."""
    if (path / "recipe.json").is_file():
        raise RecipeError(f"{option}: {path} is the directory of a run; {instead}")


def refuse_reading(source: Path, target: Path, option: str) -> None:
    """Raise ConflictError where `target`, which `option` names, holds what is read."""
    if source.resolve().is_relative_to(target.resolve()):
        raise ConflictError(f"{option}: {target} holds {source}, which is read; name another directory")


def refuse_replacing(target: Path, option: str, *, by: Callable[[Path], bool], what: str) -> None:
    """Raise ConflictError where `target` is a directory of something else than what it is replaced `by`, whatever the options."""
    if target.is_dir() and any(target.iterdir()) and not by(target):
        raise ConflictError(f"{option}: {target} holds no {what}, so --overwrite does not replace it; name another directory")


def is_model(directory: Path) -> bool:
    """Whether it is one of a Hugging Face model."""
    return (directory / "config.json").is_file()


MODEL = "model (no config.json)"
