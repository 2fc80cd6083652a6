"""The errors a user can cause. Each is a `NemotuneError` and also the standard type that fits, so library callers may catch either.

The command line prints one as a readable block and exits with code 2. A message names the key, what was got, what was
expected and what to do. Our own bugs are not here: they are assertions and plain exceptions, and keep their traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError", "ConflictError", "DataError", "DiskFullError", "HubError", "MissingFileError", "NemotuneError",
    "RecipeError", "TrainingError", "UnsupportedError", "did_you_mean",
]  # fmt: skip

AFTER_SIGNAL = "after a signal to end this process"  # a note on what a training met then, which another process may have caused


class NemotuneError(Exception):
    """Base of all errors with a remedy."""


class RecipeError(NemotuneError, ValueError):
    """A recipe key or value that does not fit."""


class MissingFileError(NemotuneError, FileNotFoundError):
    """A file, directory or hub repository that is not there."""


class ConflictError(NemotuneError, FileExistsError):
    """Something is already where the output would go, or a resumed run differs from its start."""


class DataError(NemotuneError, ValueError):
    """Rows, or files of a run, that cannot be used."""


class CheckpointError(NemotuneError, ValueError):
    """Weights or adapter files that are unreadable, incomplete or of the wrong shape."""


class TrainingError(NemotuneError, RuntimeError):
    """Training that cannot go on: dead or non-finite tensors, a diverged loss."""


class DiskFullError(NemotuneError, OSError):
    """Not enough room for an output."""


class HubError(NemotuneError, ConnectionError):
    """A hub that cannot be reached, or that refuses what was asked of it."""


class UnsupportedError(NemotuneError, NotImplementedError):
    """A recipe value whose feature is not built, or a library that this machine lacks."""


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """`" Did you mean 'q_proj'?"` for the nearest of `known`, or an empty string where none is near."""
    near = difflib.get_close_matches(got, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
