"""The second pass: spooled rows to tokens and masks, in parallel processes, in order.

Each process loads the tokenizer once. Few rows are tokenised in this process, since starting others takes seconds. A process
that dies is an error at once, never a hang.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from nemotune.data.example import Example, RowError
from nemotune.data.template import Renderer
from nemotune.errors import DataError

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
    workers = num_workers or min(_cpus(), MAX_WORKERS, 1 + path.stat().st_size // WORKER_BYTES)
    if workers > 1:
        yield from _in_processes(_chunks(path), renderer, workers)
    else:
        for lines in _chunks(path):
            yield from encode_lines(lines, renderer)


def _cpus() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def _in_processes(chunks: Iterator[list[bytes]], renderer: Renderer, workers: int) -> Iterator[Tokenised]:
    context = multiprocessing.get_context("spawn")  # a forked tokenizer may deadlock in its own threads
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(renderer,))
    waiting: deque[Future[list[Tokenised]]] = deque()
    try:
        for lines in chunks:
            waiting.append(pool.submit(_work, lines))
            if len(waiting) > 4 * workers:  # bounds what is in memory
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("data: a tokenising process died, most likely for want of memory; free some and run again") from error
    finally:
        pool.shutdown(cancel_futures=True)


_renderer: Renderer  # of a worker process: set once by `_start`


def _start(renderer: Renderer) -> None:
    global _renderer
    _renderer = renderer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot send its workers home: they would wait for rows for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(lines: list[bytes]) -> list[Tokenised]:
    return encode_lines(lines, _renderer)
