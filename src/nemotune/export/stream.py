"""The one way in which an export is written: planned from headers, streamed aside, verified, renamed.

A plan says which files there will be and which pieces each consists of. Pieces are made in threads, a few ahead of what is written, in order:
memory is a few pieces, whatever the model's size. They lie in `.NAME.partial/` (`staging.py`) until all are there, read back and on the disk;
whoever writes the same next goes on from what a stopped export left there. What a format's bytes are is in the other modules.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import torch
from torch import Tensor

from nemotune.errors import DiskFullError, NemotuneError
from nemotune.export.staging import Ends, Staging
from nemotune.files import disk_full_is_readable, partial_path, refuse_target, require_space, sync_tree, take_place

Report, Item, Result = TypeVar("Report"), TypeVar("Item"), TypeVar("Result")
Buffer = bytes | memoryview
Piece = Callable[[], Buffer]  # makes some of a part's bytes, in a thread of its own; torch has one thread there

THREADS = min(16, os.cpu_count() or 1)
SYNC_BYTES = 256_000_000  # at most so many are written anew after a loss of power


@dataclass(frozen=True)
class Part:
    """A run of bytes of a file, mostly a tensor; `num_bytes` is what they come to, and `is_exact` whether that is known before they are made."""

    name: str
    num_bytes: int
    pieces: Callable[[], Sequence[Piece]]
    is_exact: bool = True


@dataclass(frozen=True)
class OutputFile:
    """A file to write, by its name in the target; where the target is one file, the name does not matter."""

    name: str
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


def _nothing(directory: Path, ends: Ends) -> None:
    pass


@dataclass(frozen=True)
class Plan(Generic[Report]):
    """What an export writes. `identity` (JSON) is all that decides the bytes: what is read (`fingerprint`) and the options.

    `finish` adds the small files to the staged directory; `verify` reads back what is staged and raises CheckpointError where it is wrong.
    """

    identity: Mapping[str, Any]
    files: tuple[OutputFile, ...]
    verify: Callable[[Path], Report]
    finish: Callable[[Path, Ends], None] = field(default=_nothing)
    is_file: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def write(plan: Plan[Report], target: Path, *, overwrite: bool = False, done: Callable[[int], None] = lambda _: None) -> Report:
    """Carry out `plan` as `target`, which is absent, or as it was, until it is whole. `done` is told the bytes as they are written.

    Raises ConflictError where `target` exists and `overwrite` is false, or where another process writes it; DiskFullError before the
    first byte where they will not fit; and whatever the pieces and `plan.verify` find, of which nothing is left behind.
    """
    refuse_target(target, overwrite=overwrite, is_file=plan.is_file)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = partial_path(target)
    content = staging / target.name
    place = {file.name: content if plan.is_file else content / file.name for file in plan.files}
    with disk_full_is_readable(target, left=_what_is_left(staging)), Staging(staging, plan.identity, place) as journal:
        _require_space(plan, journal)
        for path in (content / "_", *place.values()) if not plan.is_file else ():
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_files(plan, journal, done)
            plan.finish(staging if plan.is_file else content, journal.ends)
            report = plan.verify(content)
        except DiskFullError:
            raise
        except NemotuneError:  # what is read is wrong, or what was written: going on from it would be no better
            shutil.rmtree(staging, ignore_errors=True)
            raise
        if not plan.is_file:
            sync_tree(content)
        refuse_target(target, overwrite=overwrite, is_file=plan.is_file)  # it may have come meanwhile
        take_place(content, target)
        shutil.rmtree(staging, ignore_errors=True)
    return report


def _write_files(plan: Plan[Any], journal: Staging, done: Callable[[int], None]) -> None:
    with _threads() as pool, ThreadPoolExecutor(1) as syncing:
        try:
            for file in plan.files:
                _write_file(journal.place[file.name], file, journal, pool, syncing, done)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results for all items, in their order: what `verify` reads back is independent work, as the pieces are."""
    with _threads() as pool:
        return list(pool.map(function, items))


def _threads() -> ThreadPoolExecutor:
    """Many threads in which torch has one each: results do not depend on how many cores there are, and no thread waits for others spinning."""
    return ThreadPoolExecutor(THREADS, initializer=partial(torch.set_num_threads, 1))


def fingerprint(*paths: Path) -> list[list[Any]]:
    """Which files, or directories of files, are read: names, sizes and times of change, which copies may keep, but for the system's own."""
    found = [sorted(path.iterdir()) if path.is_dir() else [path] for path in paths]
    stats = [(file, file.stat()) for files in found for file in files if file.is_file()]
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for file, stat in stats]


def bytes_of(tensor: Tensor) -> memoryview:
    """The values of a tensor on the CPU as they lie in memory."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def _require_space(plan: Plan[Any], journal: Staging) -> None:
    try:
        require_space(journal.path.parent, plan.num_bytes - journal.num_bytes)
    except DiskFullError:
        if not journal.num_bytes:
            shutil.rmtree(journal.path, ignore_errors=True)
        raise


def _write_file(
    path: Path, file: OutputFile, journal: Staging, pool: ThreadPoolExecutor, syncing: ThreadPoolExecutor, done: Callable[[int], None]
) -> None:
    """Write what is missing of the file, some pieces ahead in the making, and have it on the disk, which begins while more is written."""
    ends = journal.ends.setdefault(file.name, [])
    with path.open("r+b" if ends else "wb", buffering=0) as out:
        at = begun = ends[-1] if ends else 0
        out.truncate(at)
        out.seek(at)
        done(at)
        made = _ahead(((part, piece) for part in file.parts[len(ends) :] for piece in part.pieces() or [_no_bytes]), pool)
        synced: Future[None] = syncing.submit(_sync_and_note, out, file, journal, len(ends))
        for part, buffers in groupby(made, key=lambda pair: pair[0]):
            start = at
            for _, buffer in buffers:
                at += _write_all(out, buffer)
                done(len(buffer))
            assert at - start == part.num_bytes or not part.is_exact, f"{part.name}: planned {part.num_bytes} bytes, made {at - start}"
            ends.append(at)
            if at - begun >= SYNC_BYTES:
                synced.result()
                begun, synced = at, syncing.submit(_sync_and_note, out, file, journal, len(ends))
        synced.result()
        _sync_and_note(out, file, journal, len(ends))


def _ahead(jobs: Iterator[tuple[Part, Piece]], pool: ThreadPoolExecutor) -> Iterator[tuple[Part, Buffer]]:
    """The pieces' bytes in order; as many more as there are threads are being made meanwhile."""
    waiting: deque[tuple[Part, Future[Buffer]]] = deque()
    for part, piece in jobs:
        waiting.append((part, pool.submit(piece)))
        if len(waiting) > THREADS:
            part, buffer = waiting.popleft()
            yield part, buffer.result()
    for part, buffer in waiting:
        yield part, buffer.result()


def _write_all(out: IO[bytes], buffer: Buffer) -> int:
    left = memoryview(buffer)
    while left:
        left = left[out.write(left) :]
    return len(buffer)


def _sync_and_note(out: IO[bytes], file: OutputFile, journal: Staging, num_parts: int) -> None:
    os.fsync(out.fileno())
    journal.note(file.name, num_parts)


def _no_bytes() -> bytes:
    return b""


def _what_is_left(staging: Path) -> str:
    return f"what is done lies in {staging}: free some space and the same command goes on from there, or delete it"
