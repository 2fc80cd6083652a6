"""What `nemotune data` does with a recipe's blend: opens and verifies its datasets, counts, and writes the held-out documents.

What is trained on stays where it is: `stats.json` says which tokens of which files, and `stream.py` reads them. Held-out documents become a
Split as rows of text do, so that validation and evaluation know no difference.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from nemotune.data.documents import SplitWriter
from nemotune.data.example import Example
from nemotune.data.megatron.blend import Blend, read_blends
from nemotune.data.megatron.indexed import IndexedDataset
from nemotune.data.megatron.mock import MockDataset
from nemotune.data.megatron.rows import count_rows
from nemotune.data.megatron.stream import Part, Settings, Stream, open_dataset, require_known
from nemotune.data.progress import progress
from nemotune.data.rejects import Rejects
from nemotune.data.target import data_settings, read_stats, refuse_conflict
from nemotune.data.tokenise import Tokenised
from nemotune.errors import DataError, RecipeError
from nemotune.files import staged_directory, write_json
from nemotune.recipe.schema import Recipe

VERSION = 1  # of the rows that a blend makes: raise it when the same files and settings come out differently


@dataclass(frozen=True)
class Piece:
    """Tokens `begin` to `end` of a dataset of the blend, and its weight where the blend gives one."""

    dataset: IndexedDataset | MockDataset
    begin: int
    end: int
    weight: float | None

    @property
    def tokens(self) -> int:
        return self.end - self.begin


def prepare_blend(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, out_dir: Path, overwrite: bool) -> None:
    """Write `out_dir`: stats.json, and the held-out splits. Raises what `prepare` does."""
    data = recipe.data
    settings = Settings(
        num_rows=0, sequence_length=data.sequence_length, packed=data.packing is True, seed=recipe.train.seed,
        vocab_size=len(tokenizer), end=tokenizer.eos_token_id or 0,
    )  # fmt: skip
    pieces = _open(read_blends(data), settings)
    _require_splits(recipe, pieces)
    stream, run = _stream(pieces["train"], settings, recipe)
    fingerprint = _fingerprint(recipe, pieces, settings)
    refuse_conflict(out_dir, fingerprint, data_settings(recipe), overwrite)
    head = {"fingerprint": fingerprint, "settings": data_settings(recipe), "template": "none", "blend": stream.to_json()}
    trained = _train_stats(pieces["train"], stream, run)
    if (out_dir / "stats.json").is_file() and (before := read_stats(out_dir))["fingerprint"] == fingerprint:
        write_json(out_dir / "stats.json", before | head | {"splits": before["splits"] | {"train": trained}})
        return
    with staged_directory(out_dir, overwrite=True) as aside:
        splits, sources = {"train": trained}, {}
        for name in (name for name in pieces if name != "train"):
            splits[name], sources[name] = _write_held_out(aside, name, pieces[name], recipe, tokenizer)
        sizes = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
        write_json(aside / "stats.json", head | {"splits": splits, "sources": sources, "in_train_too": {}, "bytes": sizes})


def _open(blends: dict[str, Blend | float], settings: Settings) -> dict[str, list[Piece]]:
    """The datasets of each split, verified. Shares are the last documents of each dataset that is trained on: test, before it validation."""
    opened = {
        prefix: open_dataset(prefix, settings, verify=True)
        for blend in blends.values() if isinstance(blend, Blend) for prefix in blend.prefixes
    }  # fmt: skip
    pieces: dict[str, list[Piece]] = {name: [] for name in blends}
    for name, blend in blends.items():
        if isinstance(blend, Blend):
            for prefix, weight in zip(blend.prefixes, blend.weights or [None] * len(blend.prefixes), strict=True):
                dataset, end = opened[prefix], opened[prefix].num_tokens
                for held in ("test", "validation") if name == "train" else ():
                    if isinstance(share := blends.get(held), float):
                        begin = dataset.border(end - round(share * dataset.num_tokens))
                        pieces[held].append(Piece(dataset, begin, end, None))
                        end = begin
                pieces[name].append(Piece(dataset, 0, end, weight))
    return pieces


def _require_splits(recipe: Recipe, pieces: dict[str, list[Piece]]) -> None:
    """Raise for splits that are missing or empty, before anything is written."""
    if recipe.train.eval_every and "validation" not in pieces:
        raise RecipeError("train.eval_every: needs data.validation (a share such as 0.001, a dataset, or 'valid' in the blend file)")
    for piece in pieces["train"]:
        if piece.tokens < 2 or (recipe.data.packing is True and piece.tokens <= piece.dataset.count(piece.begin, piece.end)):
            raise DataError(
                f"data.train: {piece.dataset.prefix} has {piece.tokens:,} tokens to train on, none after another in a document; "
                "leave it out of the blend, or lower data.validation and data.test"
            )
    for name, found in pieces.items():
        if not sum(piece.tokens for piece in found):
            raise DataError(f"data.{name}: no document is left in it; raise the share, or name datasets that hold some")


def _stream(pieces: list[Piece], settings: Settings, recipe: Recipe) -> tuple[Stream, int]:
    """The stream of the train split, and the rows that the whole run reads of it.

    An epoch is as many rows as the datasets hold, in whole steps; where train.max_steps asks for more, it has as many as that.
    """
    train = recipe.train
    rows = [count_rows(piece.tokens, settings.sequence_length) for piece in pieces]
    steps = -(-sum(rows) // train.global_batch_size)
    if train.max_steps is not None:
        steps = max(steps, math.ceil(train.max_steps / train.epochs))
    parts = [
        Part(_absolute(piece), piece.begin, piece.end, count if piece.weight is None else piece.weight)
        for piece, count in zip(pieces, rows, strict=True)
    ]
    stream = Stream(parts, Settings(**vars(settings) | {"num_rows": steps * train.global_batch_size}))
    return stream, train.global_batch_size * min(math.ceil(steps * train.epochs), train.max_steps or math.ceil(steps * train.epochs))


def _absolute(piece: Piece) -> str:
    """A run may be resumed from elsewhere."""
    prefix = piece.dataset.prefix
    return str(Path(prefix).expanduser().resolve()) if isinstance(piece.dataset, IndexedDataset) else prefix


def _fingerprint(recipe: Recipe, pieces: dict[str, list[Piece]], settings: Settings) -> str:
    digests = {piece.dataset.prefix: "" for found in pieces.values() for piece in found}
    for found in pieces.values():
        for piece in found:
            digests[piece.dataset.prefix] = digests[piece.dataset.prefix] or piece.dataset.digest()
    blends = {name: [(digests[p.dataset.prefix], p.begin, p.end, p.weight) for p in found] for name, found in pieces.items()}
    parts = [VERSION, data_settings(recipe), blends, settings.vocab_size]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _train_stats(pieces: list[Piece], stream: Stream, run: int) -> dict[str, Any]:
    """Counts of each dataset and of all; `share`: of the run's rows, `epochs`: how often the run reads it."""
    datasets = []
    for piece, part, share in zip(pieces, stream.parts, stream.shares, strict=True):
        rows = count_rows(piece.tokens, stream.settings.sequence_length)
        documents = piece.dataset.count(piece.begin, piece.end)
        datasets.append(
            {
                "prefix": part.prefix,
                "documents": documents,
                "tokens": piece.tokens,
                "rows": rows,
                "share": share,
                "epochs": share * run / rows,
            }
        )
    sums = {key: sum(dataset[key] for dataset in datasets) for key in ("documents", "tokens", "rows")}
    return {**sums, "packs": len(stream.packs), "rows_of_the_run": run, "length": {}, "datasets": datasets}


def _write_held_out(
    directory: Path, name: str, pieces: list[Piece], recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every held-out document once, whatever the weights: long ones in pieces, and as rows of the stream where there are no borders.

    Returns the counts of what was written, and of what was not.
    """
    data = recipe.data.model_copy(update={"overflow": "split"})
    spans = [_spans(piece, data.sequence_length if data.packing == "concatenated" else 0) for piece in pieces]
    row = 0
    with (directory / "rejected.jsonl").open("a", encoding="utf-8") as file, progress(name, total=sum(map(len, spans))) as advance:
        rejects = Rejects(name, file)
        with SplitWriter(directory, name, data, seed=recipe.train.seed) as writer:
            for piece, found in zip(pieces, spans, strict=True):
                for tokens in _texts(piece, found, vocab_size=len(tokenizer)):
                    meta = {"row": row} | ({"group": Path(piece.dataset.prefix).name} if len(pieces) > 1 else {})
                    line = Example(completion=tokenizer.decode(tokens), meta=meta).to_json() + "\n"
                    writer.add(Tokenised(line.encode(), row, [(tokens, np.ones(len(tokens), dtype=bool))]), rejects)
                    row += 1
                    advance(1)
    stats = writer.stats()
    if not stats["documents"]:
        raise DataError(f"data.{name}: none of its {row} documents has two tokens or more; name others")
    return stats, {"rows": row, "bad": rejects.bad, "rejected": rejects.summary(), "repaired": {}}


def _spans(piece: Piece, width: int) -> np.ndarray:
    """Where the piece's documents begin and end, [n, 2]; with `width`, its rows of so many tokens instead."""
    inner = np.arange(piece.begin, piece.end, width) if width else piece.dataset.starts(piece.begin, piece.end)
    borders = np.unique(np.concatenate([[piece.begin], inner, [piece.end]]))
    return np.stack([borders[:-1], borders[1:]], axis=1)


def _texts(piece: Piece, spans: np.ndarray, *, vocab_size: int) -> Iterator[np.ndarray]:
    for start, end in spans.tolist():
        tokens = piece.dataset.read(start, end).astype(np.int64)
        require_known(tokens, piece.dataset.prefix, vocab_size=vocab_size)
        yield tokens.astype(np.int32)
