"""The second pass: spooled rows to tokens and masks, in parallel processes, in order.

Each process gets the tokenizer once. Few rows are tokenised in this process, since starting others takes seconds (`workers.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from nemotune.data.example import Example, RowError
from nemotune.data.template import Renderer
from nemotune.data.workers import count_cpus, in_processes

CHUNK_ROWS = 64
MAX_WORKERS = 8
WORKER_BYTES = 4 << 20  # rows that keep one process busy for longer than it takes to start


@dataclass(frozen=True)
class Tokenised:
    """A processed row (`line`) and its documents: (tokens int32 [T], mask bool [T]) each; or the error that makes it unusable."""

    line: bytes
    row: int
    documents: list[tuple[np.ndarray, np.ndarray]]
    error: RowError | None = None


def tokenise(path: Path, renderer: Renderer, *, num_workers: int | None = None) -> Iterator[Tokenised]:
    """Every spooled row of `path`, in order. `num_workers` None: as many processes as the file is worth, at most 8."""
    workers = num_workers or min(count_cpus(), MAX_WORKERS, 1 + path.stat().st_size // WORKER_BYTES)
    if workers > 1:
        yield from in_processes(_chunks(path), partial(encode_lines, renderer=renderer), workers)
    else:
        for lines in _chunks(path):
            yield from encode_lines(lines, renderer)


def encode_lines(lines: list[bytes], renderer: Renderer) -> list[Tokenised]:
    """Tokenise processed rows, one JSON line each."""
    return [_encode(line, renderer) for line in lines]


def _encode(line: bytes, renderer: Renderer) -> Tokenised:
    example = Example.from_json(line)
    try:
        encoded = renderer.encode(example)
    except RowError as error:
        return Tokenised(line, example.meta["row"], [], error)
    documents = [(np.array(sample.tokens, dtype=np.int32), np.array(sample.mask, dtype=bool)) for sample in encoded]
    return Tokenised(line, example.meta["row"], documents)


def _chunks(path: Path) -> Iterator[list[bytes]]:
    with path.open("rb") as file:
        while lines := list(islice(file, CHUNK_ROWS)):
            yield lines
