"""Work on chunks of rows in processes of its own, in order. A process that dies is an error at once, never a hang."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from nemotune.errors import DataError

Given = TypeVar("Given")
Made = TypeVar("Made")


def count_cpus() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(chunks: Iterator[list[Given]], work: Callable[[list[Given]], list[Made]], workers: int) -> Iterator[Made]:
    """What `work` makes of each chunk, in the order of the chunks, by `workers` processes. `work` is sent to each of them once."""
    context = multiprocessing.get_context("spawn")  # a forked tokenizer may deadlock in its own threads
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(work,))
    waiting: deque[Future[list[Made]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > 4 * workers:  # bounds what is in memory
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("data: a tokenising process died, most likely for want of memory; free some and run again") from error
    finally:
        pool.shutdown(cancel_futures=True)


_given_work: Callable[[list[Any]], list[Any]]  # of a worker process: set once by `_start`


def _start(work: Callable[[list[Any]], list[Any]]) -> None:
    global _given_work
    _given_work = work
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot send its workers home: they would wait for rows for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: list[Any]) -> list[Any]:
    return _given_work(chunk)
