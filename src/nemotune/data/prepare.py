"""From a recipe's rows to prepared data on disk: read, share out, tokenise, pack, count; cached by content.

    sources --spool--> processed rows --fingerprint--> in the cache? --no--> tokenise, write splits --publish--> cache
                                                                                            cache --link--> run directory

Reads top to bottom in `prepare`. Nothing appears under its final name before it is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from transformers import PreTrainedTokenizerFast

from nemotune.data.cache import default_cache_dir, link_files, publish, workspace
from nemotune.data.documents import SplitWriter
from nemotune.data.megatron.prepare import prepare_blend
from nemotune.data.megatron.stream import Stream
from nemotune.data.progress import progress
from nemotune.data.rejects import Rejects
from nemotune.data.sharing import TEST, TRAIN, VALIDATION, share_out
from nemotune.data.split import Split
from nemotune.data.spool import Spool, spool
from nemotune.data.target import data_settings, read_stats, refuse_conflict, refuse_foreign
from nemotune.data.template import Renderer
from nemotune.data.tokenise import tokenise
from nemotune.errors import DataError, MissingFileError
from nemotune.files import staged_directory, write_json
from nemotune.recipe.schema import Recipe, Source

VERSION = 2  # of the prepared form: raise it when the same rows and settings come out differently
NAMES = {TRAIN: "train", VALIDATION: "validation", TEST: "test"}


@dataclass(frozen=True)
class Prepared:
    """Prepared data: a Split each, or None where the recipe holds nothing out; `stats` is stats.json. A blend is trained on where it lies."""

    train: Split | Stream
    validation: Split | None
    test: Split | None
    stats: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Changes with rows, template, tokenizer and data settings, and with nothing else."""
        return self.stats["fingerprint"]

    @classmethod
    def load(cls, directory: Path) -> Prepared:
        """The data that `prepare` left in `directory`. Raises MissingFileError, and DataError for a file that is not whole."""
        if not (directory / "stats.json").is_file():
            raise MissingFileError(f"{directory}: no prepared data there; run `nemotune data` first")
        stats = read_stats(directory)
        held = {name: Split(directory, name) if name in stats["splits"] else None for name in ("validation", "test")}
        return cls(Stream.from_json(stats["blend"]) if "blend" in stats else Split(directory, "train"), **held, stats=stats)


def prepare(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    out_dir: Path,
    cache_dir: Path | None = None,
    num_workers: int | None = None,
    overwrite: bool = False,
) -> Prepared:
    """Prepare the rows of `recipe` into `out_dir` (hard links into the cache where the disk allows).

    Raises DataError when too many rows are bad or none is left, MissingFileError, DiskFullError, and ConflictError when `out_dir`
    holds data of another fingerprint and `overwrite` is false. On any error `out_dir` stays as it was.
    """
    refuse_foreign(out_dir)
    data = recipe.data
    if data.format == "megatron":
        prepare_blend(recipe, tokenizer, out_dir=out_dir, overwrite=overwrite)
        return Prepared.load(out_dir)
    cache_dir = cache_dir or default_cache_dir()
    renderer = Renderer(tokenizer, template=data.template, thinking=data.thinking, train_on=data.train_on)
    with workspace(cache_dir) as work:
        with (work / "rejected.jsonl").open("w", encoding="utf-8") as rejected:
            spools = _spool_sources(recipe, work.parent, rejected)
            settings = data_settings(recipe)
            fingerprint = _fingerprint(settings, spools, renderer)
            refuse_conflict(out_dir, fingerprint, settings, overwrite)
            cached = _is_whole(cache_dir / fingerprint)
            if not cached:
                stats = _write_splits(recipe, renderer, spools, work, num_workers)
        if not cached:
            head = {"fingerprint": fingerprint, "settings": settings, "template": renderer.template_name}
            write_json(work / "stats.json", head | stats | {"bytes": {file.name: file.stat().st_size for file in sorted(work.iterdir())}})
        with staged_directory(out_dir, overwrite=True) as aside:
            link_files(cache_dir / fingerprint if cached else work, aside)
        publish(work, cache_dir / fingerprint)  # last: by now the files are on the disk, and not just in its cache
    return Prepared.load(out_dir)


def _is_whole(directory: Path) -> bool:
    """Whether `directory` of the cache can be used; one that cannot is removed."""
    try:
        read_stats(directory)
    except (MissingFileError, DataError):
        shutil.rmtree(directory, ignore_errors=True)
        return False
    return True


def _spool_sources(recipe: Recipe, directory: Path, rejected: TextIO) -> dict[str, Spool]:
    """The processed rows of each source, by split name. `max_samples` bounds the training source, so that held-out rows stay comparable."""
    data = recipe.data
    sources = {"train": data.train, "validation": data.validation, "test": data.test}
    spools = {}
    for name, source in sources.items():
        if isinstance(source, Source):
            spools[name] = spool(
                source,
                row_format=data.format,
                path=directory / f"{name}.spool",
                rejects=Rejects(name, rejected),
                seed=recipe.train.seed,
                max_rows=data.max_samples if name == "train" else None,
            )
            if not spools[name].rows:
                raise DataError(f"data.{name}: {source.path} has no rows; check the path and the split")
            spools[name].rejects.check(rows=spools[name].rows, limit=data.max_bad_rows)
    return spools


def _fingerprint(settings: dict[str, Any], spools: dict[str, Spool], renderer: Renderer) -> str:
    parts = [VERSION, settings, {name: found.digest for name, found in spools.items()}, renderer.digest()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _write_splits(recipe: Recipe, renderer: Renderer, spools: dict[str, Spool], work: Path, num_workers: int | None) -> dict[str, Any]:
    """Tokenise every source into its splits; returns the stats."""
    data = recipe.data
    shares = {name: _shares(recipe, name, found) for name, found in spools.items()}
    names = [NAMES[share] for share in sorted({int(share) for each in shares.values() for share in np.unique(each)})]
    with ExitStack() as stack:
        writers = {name: stack.enter_context(SplitWriter(work, name, data, seed=recipe.train.seed)) for name in names}
        for name, found in spools.items():
            with progress(f"tokenising {name}", total=len(found.keys)) as advance:
                for share, row in zip(shares[name], tokenise(found.path, renderer, num_workers=num_workers), strict=True):
                    writers[NAMES[int(share)]].add(row, found.rejects)
                    advance(1)
            found.rejects.check(rows=found.rows, limit=data.max_bad_rows)
    stats = {name: writer.stats() for name, writer in writers.items()}
    _refuse_empty(stats, spools, sequence_length=data.sequence_length)
    sources = {
        name: {"rows": found.rows, "bad": found.rejects.bad, "rejected": found.rejects.summary(), "repaired": found.repaired}
        for name, found in spools.items()
    }
    return {"sources": sources, "splits": stats, **_overlaps(spools, shares)}


def _shares(recipe: Recipe, name: str, found: Spool) -> np.ndarray:
    """The split of each usable row of a source: a held-out source goes whole to its own."""
    if name != "train":
        return np.full(len(found.keys), VALIDATION if name == "validation" else TEST, dtype=np.int8)
    held = [share if isinstance(share, float | int) else 0.0 for share in (recipe.data.validation, recipe.data.test)]
    return share_out(found.keys, validation=held[0], test=held[1])


def _overlaps(spools: dict[str, Spool], shares: dict[str, np.ndarray]) -> dict[str, Any]:
    """Rows of held-out sources that are trained on as well, word for word, and test rows that are validated on: such scores say little."""
    keys = {split: np.concatenate([spools[name].keys[each == split] for name, each in shares.items()]) for split in NAMES}
    trained = {name: int(np.isin(found.keys, keys[TRAIN]).sum()) for name, found in spools.items() if name != "train"}
    return {"in_train_too": trained, "in_validation_too": int(np.isin(keys[TEST], keys[VALIDATION]).sum())}


def _refuse_empty(stats: dict[str, dict[str, Any]], spools: dict[str, Spool], *, sequence_length: int) -> None:
    for name in ("train", *stats):
        if not stats.get(name, {}).get("documents"):
            reasons = spools.get(name, spools["train"]).rejects.summary()
            told = "; ".join(f"{entry['count']} x {reason}" for reason, entry in reasons.items()) or "it was given none"
            raise DataError(f"data: no document is left in the {name} split ({told}); data.sequence_length is {sequence_length}")
