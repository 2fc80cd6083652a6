"""Outputs that are absent or whole: written aside under a name beginning with a dot, then renamed into place.

Every file and directory that nemotune leaves behind goes through here, so a full disk or a lost process never leaves half of one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemotune.errors import ConflictError, DataError, DiskFullError, MissingFileError

__all__ = [
    "atomic_file", "disk_full_is_readable", "partial_path", "read_json", "refuse_target", "require_space", "staged_directory", "sync", "sync_tree",
    "take_place", "write_json",
]  # fmt: skip
EXCHANGE = {
    "linux": ("renameat2", (-100,), 2),
    "darwin": ("renameatx_np", (-2,), 2),
}  # the call, AT_FDCWD, and RENAME_EXCHANGE or RENAME_SWAP


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = partial_path(path)
    try:
        with disk_full_is_readable(path):
            yield aside
            sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_directory(target: Path, *, overwrite: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty directory beside `target` that becomes `target` when the block ends without an error.

    Raises ConflictError where `target` exists and `overwrite` is false, DiskFullError where `needed_bytes` do not fit.
    """
    refuse_target(target, overwrite=overwrite)
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    require_space(target.parent, needed_bytes)
    aside = partial_path(target)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with disk_full_is_readable(target):
            yield aside
            sync_tree(aside)
        take_place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # only where nothing came of it: a directory in use is not empty


def refuse_target(target: Path, *, overwrite: bool, is_file: bool = False) -> None:
    """Raise ConflictError where `target` may not be written: it is there and `overwrite` is false, or a file where a directory is to be, or the reverse."""
    if not target.exists():
        return
    if not overwrite:
        raise ConflictError(f"{target}: already exists; choose another {'name' if is_file else 'directory'} or pass --overwrite")
    if target.name in ("", "..") or target.is_mount():
        raise ConflictError(f"{target}: is a mount point or relative to where you are, and cannot be replaced; name a new directory in it")
    if is_file != target.is_file():
        kinds = ("directory", "file") if is_file else ("file", "directory")
        raise ConflictError(f"{target}: is a {kinds[0]}, which --overwrite does not replace by a {kinds[1]}; choose another name")


def partial_path(target: Path) -> Path:
    """The name under which `target` is written."""
    return target.with_name(f".{target.name}.partial")


def require_space(directory: Path, needed_bytes: int) -> None:
    """Raise DiskFullError when the disk of `directory` has less than `needed_bytes` free."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise DiskFullError(
            f"{directory}: {needed_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free; free some space or write elsewhere"
        )


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises MissingFileError, and DataError where it is cut off or something else; both end with `remedy`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFileError(f"{path}: no such file; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cut off or not JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: got {type(value).__name__}, expected an object; {remedy}")
    return value


@contextlib.contextmanager
def disk_full_is_readable(target: Path, *, left: str = "nothing was left behind. Free some space and run again") -> Iterator[None]:
    """Make an error that says that the disk is full a DiskFullError about `target`; `left` says what is there now and what to do."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not _says_disk_full(error):
            raise
        raise DiskFullError(f"{_final(target)}: the disk is full; {left}") from error


def _final(path: Path) -> str:
    """The name that `path` gets when it, and whatever it lies in, is whole."""
    return re.sub(r"(^|/)\.([^/]+)\.partial(?=/|$)", r"\1\2", str(path))


def _says_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return str(error).endswith((f"(os error {errno.ENOSPC})", f"(os error {errno.EDQUOT})"))  # as Rust says it: tokenizers, safetensors


def take_place(aside: Path, target: Path) -> None:
    """Rename `aside`, a file or a directory, to `target`. What was there before is deleted last: at no moment is `target` half of anything.

    Where `target` is a link the link goes, and what it names stays.
    """
    old = target.with_name(f".{target.name}.old")
    if target.is_symlink() and aside.is_dir():
        target.unlink()
    is_swapped = target.is_dir() and _exchange(aside, target)
    if not is_swapped:
        if target.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        try:
            os.replace(aside, target)
        except OSError:
            if old.is_dir() and not target.exists():
                os.replace(old, target)
            raise
    sync(target.parent)
    if is_swapped:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)  # of a process too that was killed between its two renames


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step, where the system and the file system can."""
    name, at, flag = EXCHANGE.get(sys.platform, ("", (), 0))
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    return call is not None and call(*at, os.fsencode(one), *at, os.fsencode(other), flag) == 0


def sync_tree(directory: Path) -> None:
    """Have every file and directory under `directory` on the disk, itself too."""
    for path in (*directory.rglob("*"), directory):
        if path.is_file() or path.is_dir():
            sync(path)


def sync(path: Path) -> None:
    """Have the file, or the names in the directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
