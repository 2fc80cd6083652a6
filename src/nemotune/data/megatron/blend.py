"""What a recipe's `data.train`, `data.validation` and `data.test` name where `data.format` is megatron: datasets and their weights.

A name is a blend file (JSON: {"train": ..., "valid": ..., "test": ...}, as Megatron-LM's --per-split-data-args-path reads it), the prefix of
one dataset, or `mock`. Nothing but the blend file is read here; the datasets themselves are opened by `prepare.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotune.errors import DataError, MissingFileError, RecipeError, did_you_mean
from nemotune.files import read_json
from nemotune.recipe.blend import MOCK
from nemotune.recipe.schema import Data, Source

SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # ours, and a blend file's


@dataclass(frozen=True)
class Blend:
    """Prefixes of datasets and their weights, any positive numbers; without weights each dataset counts by its size."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None


def read_blends(data: Data) -> dict[str, Blend | float]:
    """What each split is made of: a Blend of its own, or a share of each dataset of the train split; a split without either is left out.

    Where `data.validation` or `data.test` is null, the blend file of `data.train` may have a list for it. Raises RecipeError,
    DataError, MissingFileError.
    """
    found: dict[str, Blend | float] = {}
    for name, held in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if isinstance(held, Source):
            found[name] = _named(held, name)
        elif held:
            found[name] = held
        elif held is None and _is_file(data.train):
            blend = _of_file(Path(data.train.path).expanduser(), SPLITS[name])
            found |= {name: blend} if blend else {}
    return found


def parse_blend(value: Any, *, key: str) -> Blend:
    """A list, or text split on spaces, of prefixes or of alternating weights and prefixes: read as megatron-core's get_blend_from_list does."""
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(word, str | int | float) for word in words):
        raise DataError(f"{key}: got {value!r}, expected prefixes, or weights and prefixes in turn: [0.7, web, 0.3, books]")
    heads = [_number(word) for word in words[::2]]
    if len(words) % 2 or all(head is None for head in heads):
        return Blend(tuple(str(word).strip() for word in words))
    wrong = [word for word, head in zip(words[::2], heads, strict=True) if head is None or not 0 < head < float("inf")]
    if wrong:
        raise DataError(f"{key}: got {wrong[0]!r} for a weight, expected numbers above 0 before each prefix, or no weights at all")
    return Blend(tuple(str(word).strip() for word in words[1::2]), tuple(head for head in heads if head is not None))


def _named(source: Source, name: str) -> Blend:
    """What `data.<name>` names."""
    if source.config or source.split:
        raise RecipeError(f"data.{name}: got config or split, which a blend has not; name a blend file, a prefix, or {MOCK}")
    path = Path(source.path).expanduser()
    if source.path == MOCK and name != "train":
        raise RecipeError(f"data.{name}: got {MOCK}, expected a share of the training documents, such as 0.0001")
    if not _is_file(source):
        return Blend((source.path.removesuffix(".bin").removesuffix(".idx"),))
    blend = _of_file(path, SPLITS[name])
    if blend is None:
        raise DataError(f"data.{name}: {path} has no '{SPLITS[name]}', expected a list of weights and prefixes there")
    return blend


def _is_file(source: Source) -> bool:
    return source.path.endswith(".json")


def _of_file(path: Path, name: str) -> Blend | None:
    """The blend of one split of a blend file, with prefixes as they are found from here, else from beside the file."""
    remedy = 'a blend file is JSON: {"train": [0.7, "web", 0.3, "books"], "valid": ["held_out"]}'
    content = read_json(path, remedy=remedy)
    for key in content:
        if key not in SPLITS.values():
            raise DataError(f"{path}: unknown key '{key}', expected train, valid or test.{did_you_mean(key, SPLITS.values())} {remedy}")
    if not content.get(name):
        return None
    blend = parse_blend(content[name], key=f"{path}: {name}")
    return Blend(tuple(_placed(prefix, path.parent) for prefix in blend.prefixes), blend.weights)


def _placed(prefix: str, beside: Path) -> str:
    here = Path(prefix).expanduser()
    there = beside / here
    return str(there if not Path(f"{here}.idx").exists() and Path(f"{there}.idx").exists() else here)


def require_files(data: Data) -> None:
    """Raise MissingFileError for a dataset whose files are not there, and whatever `read_blends` does; no dataset is opened."""
    for blend in read_blends(data).values():
        for prefix in _prefixes(blend):
            for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
                if not path.is_file():
                    raise MissingFileError(f"{path}: no such file; a dataset is PREFIX.bin with PREFIX.idx, named by PREFIX")


def _prefixes(blend: Blend | float) -> Sequence[str]:
    return [prefix for prefix in blend.prefixes if prefix != MOCK] if isinstance(blend, Blend) else ()


def _number(word: str | float) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
