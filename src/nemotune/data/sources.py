"""Rows from wherever a recipe points: a file, a directory of files, a built-in set, the Hugging Face hub. Always one at a time.

What a row means is the business of `formats/`; how a file of each kind is read, of `readers.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemotune import assets
from nemotune.data.megatron.blend import require_files
from nemotune.data.readers import READERS, count_rows_of, without_nested_nulls
from nemotune.errors import DataError, MissingFileError, did_you_mean
from nemotune.recipe.schema import Recipe, Source

Row = dict[str, Any]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def iter_rows(source: Source) -> Iterator[Row]:
    """Every row of `source`, streaming. `config` and `split` choose among a hub set's or a directory's; a file holds just its rows.

    Raises MissingFileError for what is not there, DataError for what cannot be read, both on the first row asked for.
    """
    files = _local_files(source)
    if files is None:
        yield from _hub_rows(source)
        return
    for file in files:
        yield from READERS[_suffix(file)](file)


def require_sources(recipe: Recipe) -> None:
    """Raise what `iter_rows` would for sources on this machine whose files are not there or of no kind that is read; no rows are read."""
    if recipe.data.format == "megatron":
        require_files(recipe.data)
        return
    for source in (recipe.data.train, recipe.data.validation, recipe.data.test):
        if isinstance(source, Source):
            for file in _local_files(source) or ():
                _suffix(file)


def count_rows(source: Source) -> int | None:
    """How many rows `iter_rows` will give, blank lines counted too; None for a hub set. Raises MissingFileError, DataError."""
    files = _local_files(source)
    return None if files is None else sum(count_rows_of(file) for file in files if _suffix(file))


def size_of(source: Source) -> int | None:
    """The bytes of its files; None for a hub set. Raises MissingFileError, DataError."""
    files = _local_files(source)
    return None if files is None else sum(file.stat().st_size for file in files)


def _local_files(source: Source) -> list[Path] | None:
    """The files of `source` in order; None for a hub set. Raises MissingFileError, DataError."""
    builtin = assets.resolve(source.path)
    local = builtin or Path(source.path).expanduser()
    if local.is_dir():
        return _files(local, source.split)
    if local.is_file():
        return [local]
    if builtin is None and is_hub_id(source.path) and not _nearby(local):
        return None
    raise MissingFileError(f"{local}: no such file or directory.{_nearby(local)}")


def _suffix(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix not in READERS:
        raise DataError(f"{file}: got a '{suffix}' file, expected one of {', '.join(READERS)}")
    return suffix


def _files(directory: Path, split: str | None) -> list[Path]:
    """The data files of `directory` in name order: those under `<split>/` or named `<split>*` where a split is asked for."""
    found = sorted(file for file in directory.rglob("*") if file.suffix.lower() in READERS and not _is_hidden(file, directory))
    chosen = [file for file in found if split is None or _is_of_split(file.relative_to(directory), split)]
    if not chosen:
        wanted = f"of split '{split}' " if split else ""
        raise MissingFileError(
            f"{directory}: no data file {wanted}in it, expected {', '.join(READERS)}; found {len(found)} in all"
            + "".join(f" {file.name}" for file in found[:3])
        )
    kinds = sorted({file.suffix.lower() for file in chosen})
    if len(kinds) > 1:
        raise DataError(
            f"{directory}: holds {' and '.join(kinds)} files, expected one kind of data; name the file, or move the others away"
        )
    return chosen


def _is_hidden(file: Path, directory: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in file.relative_to(directory).parts)
    return hidden or file.name in ("dataset_info.json", "state.json", "dataset_dict.json")  # what `datasets` writes beside its rows


def _is_of_split(file: Path, split: str) -> bool:
    return split in file.parts[:-1] or re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", file.name) is not None


def is_hub_id(path: str) -> bool:
    """Whether `path` is spelled as the id of a hub set; one may be a directory here all the same."""
    return bool(HUB_ID.fullmatch(path)) and not path.startswith(".") and Path(path).suffix.lower() not in READERS


def _nearby(path: Path) -> str:
    """The hint at a file of nearly the same name, or an empty string."""
    return did_you_mean(path.name, [file.name for file in path.parent.iterdir()]) if path.parent.is_dir() else ""


def _hub_rows(source: Source) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    split = source.split or "train"
    try:
        rows = load_dataset(source.path, source.config, split=split, streaming=True)
        for row in rows:
            yield without_nested_nulls(row)
    except (DatasetsError, ValueError, OSError) as error:
        # datasets raises ValueError for an unknown config or split, OSError (requests, httpx, FileNotFoundError) for the network
        raise MissingFileError(
            f"{source.path}: neither a file here nor readable as a hub set (config {source.config}, split {split}): "
            f"{_first_line(error)}; check the name and the network, or give a local path"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
