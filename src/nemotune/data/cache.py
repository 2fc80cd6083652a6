"""Where prepared data are kept for the next run with the same content, and how they get from there to a run directory.

The cache is `$NEMOTUNE_CACHE`, else `~/.cache/nemotune`, one directory under `data/` for each fingerprint; it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemotune.errors import DiskFullError

SCRATCH, LOCK = ".prepare-", "lock"  # directories of preparations under way, and the file in each that its owner has locked


def default_cache_dir() -> Path:
    """$NEMOTUNE_CACHE/data, else ~/.cache/nemotune/data."""
    return Path(os.environ.get("NEMOTUNE_CACHE") or "~/.cache/nemotune").expanduser() / "data"


@contextmanager
def workspace(cache_dir: Path) -> Iterator[Path]:
    """Yield an empty directory on the cache's disk, gone afterwards with everything in it and beside it. Raises DiskFullError."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    _remove_orphans(cache_dir)
    with _scratch(cache_dir) as scratch:
        work = scratch / "data"
        work.mkdir()
        try:
            yield work
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DiskFullError(
                f"{cache_dir}: the disk is full; nothing was left behind. Free some space or point NEMOTUNE_CACHE elsewhere"
            ) from error


@contextmanager
def _scratch(cache_dir: Path) -> Iterator[Path]:
    """A directory with a lock in it that the system lets go of when this process dies. It gets its name once it is locked."""
    made = Path(tempfile.mkdtemp(dir=cache_dir, prefix=".new"))
    scratch = made.with_name(SCRATCH + made.name)
    with (made / LOCK).open("w") as lock:
        with contextlib.suppress(OSError):  # a disk without locks: then no one removes the directory either
            fcntl.flock(lock, fcntl.LOCK_EX)
        made.rename(scratch)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _remove_orphans(cache_dir: Path) -> None:
    """Remove what preparations left that were killed."""
    for scratch in cache_dir.glob(f"{SCRATCH}*"):
        try:
            with (scratch / LOCK).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError:  # its owner lives, or has just removed it
            continue


def publish(work: Path, target: Path) -> None:
    """Move finished work into the cache; whoever prepared the same before, or meanwhile, is as good."""
    if target.is_dir():
        return
    try:
        work.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def link_files(source: Path, target: Path) -> None:
    """Give `target` the files of `source`: hard links, or copies where the two lie on different disks."""
    for file in sorted(source.iterdir()):
        try:
            os.link(file, target / file.name)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
            shutil.copy2(file, target / file.name)
