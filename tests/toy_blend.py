"""Small datasets in Megatron's form, and how to spell them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from nemotune.data.megatron.indexed import IndexedDataset
from nemotune.data.megatron.rows import Row
from nemotune.data.megatron.writer import indexed_writer


def make_dataset(prefix: Path, lengths, *, first: int = 3, vocab_size: int = 500, end: int | None = None) -> IndexedDataset:
    """Documents of those lengths; tokens count up from `first` through all of them, so that each tells where it is from."""
    at = 0
    with indexed_writer(prefix, "uint16") as writer:
        for length in lengths:
            tokens = first + np.arange(at, at + length) % (vocab_size - first)
            writer.add([*tokens[:-1], end] if end is not None and length else tokens)
            at += length
    return IndexedDataset(prefix)


def make_blend(path: Path, **splits) -> Path:
    """A blend file."""
    path.write_text(json.dumps(splits))
    return path


def spans(row: Row) -> list[tuple[int, int]]:
    """Every span of a row."""
    return [span for document in row for span in document]
