"""The first pass over a source: raw rows to processed rows on disk, with what is needed to fingerprint and share them out.

One row is in memory at a time; 8 bytes a row stay. The second pass (`tokenise.py`) reads the spooled file.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from nemotune.data.example import RowError
from nemotune.data.formats import FORMATS
from nemotune.data.progress import progress
from nemotune.data.rejects import Rejects
from nemotune.data.sharing import content_key
from nemotune.data.sources import iter_rows
from nemotune.recipe.schema import Source


@dataclass(frozen=True)
class Spool:
    """path: processed rows, JSON lines; rows: how many raw ones were read; keys [usable] uint64; digest: of the file's content."""

    path: Path
    rows: int
    keys: np.ndarray
    digest: str
    repaired: dict[str, int]
    rejects: Rejects


def spool(source: Source, *, row_format: str, path: Path, rejects: Rejects, seed: int, max_rows: int | None = None) -> Spool:
    """Convert the (first `max_rows`) rows of `source` and write them to `path`. Bad rows go to `rejects`."""
    convert = FORMATS[row_format]
    keys, digest, repaired, count = array("Q"), hashlib.sha256(), Counter[str](), 0
    with path.open("w", encoding="utf-8") as file, progress(f"reading {source.path}", total=max_rows) as advance:
        for number, row in enumerate(islice(iter_rows(source), max_rows)):
            count = number + 1
            advance(1)
            try:
                example = convert(row)
            except RowError as error:
                rejects.add(number, error)
                continue
            repaired.update(example.meta.get("repaired", ()))
            line = replace(example, meta={"row": number, **example.meta}).to_json()
            file.write(line + "\n")
            digest.update(line.encode())
            keys.append(content_key(example.content(), seed))
    return Spool(path, count, np.frombuffer(keys, dtype=np.uint64), digest.hexdigest(), dict(repaired), rejects)
