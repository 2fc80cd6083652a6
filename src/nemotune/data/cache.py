"""Where prepared data are kept for the next run with the same content, and how they get from there to a run directory.

The cache is `$NEMOTUNE_CACHE`, else `~/.cache/nemotune`, one directory under `data/` for each fingerprint; it may be deleted at any time.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemotune.errors import DiskFullError


def default_cache_dir() -> Path:
    """$NEMOTUNE_CACHE/data, else ~/.cache/nemotune/data."""
    return Path(os.environ.get("NEMOTUNE_CACHE") or "~/.cache/nemotune").expanduser() / "data"


@contextmanager
def workspace(cache_dir: Path) -> Iterator[Path]:
    """Yield an empty directory on the cache's disk, gone afterwards with everything in it and beside it. Raises DiskFullError."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".prepare-") as scratch:
        work = Path(scratch, "data")
        work.mkdir()
        try:
            yield work
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DiskFullError(
                f"{cache_dir}: the disk is full; nothing was left behind. Free some space or point NEMOTUNE_CACHE elsewhere"
            ) from error


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
