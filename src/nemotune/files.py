"""Outputs that are absent or whole: written aside under a name beginning with a dot, then renamed into place.

Every file and directory that nemotune leaves behind goes through here, so a full disk or a lost process never leaves half of one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemotune.errors import ConflictError, DataError, DiskFullError, MissingFileError

__all__ = ["atomic_file", "disk_full_is_readable", "partial_path", "read_json", "require_space", "staged_directory", "write_json"]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = partial_path(path)
    try:
        with disk_full_is_readable(path):
            yield aside
            _sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_directory(target: Path, *, overwrite: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty directory beside `target` that becomes `target` when the block ends without an error.

    Raises ConflictError where `target` exists and `overwrite` is false, DiskFullError where `needed_bytes` do not fit.
    """
    if target.exists() and not overwrite:
        raise ConflictError(f"{target}: already exists; choose another directory or pass --overwrite")
    if target.exists() and not target.is_dir():
        raise ConflictError(f"{target}: is a file, which --overwrite does not replace by a directory; choose another name")
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    require_space(target.parent, needed_bytes)
    aside = partial_path(target)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with disk_full_is_readable(target):
            yield aside
            for file in aside.rglob("*"):
                if file.is_file():
                    _sync(file)
        _swap(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # only where nothing came of it: a directory in use is not empty


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
    except ValueError as error:
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


def _swap(aside: Path, target: Path) -> None:
    """Rename `aside` to `target`; an old `target` is moved away first and deleted last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(aside, target)
    shutil.rmtree(old, ignore_errors=True)


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
