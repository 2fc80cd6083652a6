"""What ships inside the package: `nemotron-tiny`, the built-in model, with its tokenizer, chat template and sample rows.

A recipe names these as paths that begin with `nemotron-tiny`; `scripts/` re-creates the files.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path, PurePosixPath

BUILTIN = "nemotron-tiny"


def resolve(path: str) -> Path | None:
    """Where the built-in `path` lies on this machine, or None when `path` names nothing built in (`./nemotron-tiny` is the user's)."""
    parts = PurePosixPath(path).parts
    if path.startswith(("/", ".")) or not parts or parts[0] != BUILTIN or ".." in parts:
        return None
    return Path(str(files(__name__))).joinpath(*parts)
