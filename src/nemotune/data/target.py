"""The directory that prepared data go to: what in it is whole, what may be replaced, and which settings it was prepared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemotune.errors import ConflictError, DataError
from nemotune.files import read_json
from nemotune.recipe.schema import Recipe


def read_stats(directory: Path) -> dict[str, Any]:
    """stats.json, with the files beside it as long as it says. Raises MissingFileError, DataError."""
    remedy = "prepare it again with `nemotune data RUN --overwrite`"
    stats = read_json(directory / "stats.json", remedy=remedy)
    for name, size in stats.get("bytes", {"stats.json": None}).items():
        got = (directory / name).stat().st_size if (directory / name).is_file() else 0
        if got != size:
            raise DataError(f"{directory / name}: unreadable (it has {got} bytes and was written with {size}); {remedy}")
    return stats


def data_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide what is prepared; where rows and templates lie does not, their content does."""
    settings = recipe.data.model_dump(mode="json", exclude={"train", "template"})
    for held in ("validation", "test"):
        if isinstance(settings[held], dict):
            settings[held] = "rows of its own"
    return settings | {"seed": recipe.train.seed}


def refuse_foreign(out_dir: Path) -> None:
    """Prepared data take the place of prepared data, never of anything else, whatever the options."""
    if out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / "stats.json").is_file():
        raise ConflictError(
            f"{out_dir}: is not prepared data (no stats.json), so it is not replaced; move it away or choose another --run-dir"
        )


def refuse_conflict(out_dir: Path, fingerprint: str, settings: dict[str, Any], overwrite: bool) -> None:
    """Raise ConflictError, naming what differs, where `out_dir` holds data of another fingerprint."""
    if overwrite or not (out_dir / "stats.json").is_file():
        return
    before = read_stats(out_dir)
    if before["fingerprint"] != fingerprint:
        changed = [f"data.{key}" if key != "seed" else "train.seed" for key in settings if settings[key] != before["settings"].get(key)]
        what = ", ".join(changed) or "the rows, the template or the tokenizer"
        raise ConflictError(f"{out_dir}: holds data prepared with other {what}; choose another run name or pass --overwrite")
