"""Writes one split: its processed rows, its documents within the length limit, its packs; and counts what it writes.

The last stop before disk: rows over the limit follow `data.overflow` here, and a document that teaches nothing is turned away.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemotune.data.example import RowError
from nemotune.data.packing import pack_stream
from nemotune.data.rejects import Rejects
from nemotune.data.split import DOCUMENTS, PACKS, Writer
from nemotune.data.tokenise import Tokenised
from nemotune.errors import DataError
from nemotune.recipe.schema import Data

TOO_LONG = "longer than data.sequence_length"


class SplitWriter:
    """Writes `directory/<name>.jsonl`, `.documents.arrow` and, on close, `.packs.arrow`. A context manager."""

    def __init__(self, directory: Path, name: str, data: Data, *, seed: int) -> None:
        self.name, self.data, self.seed = name, data, seed
        self._directory = directory
        self._rows = (directory / f"{name}.jsonl").open("wb")
        self._documents = Writer(directory / f"{name}.documents.arrow", DOCUMENTS)
        self._lengths = array("i")  # 4 bytes a document stay in memory: packing needs them after the last one
        self._counts = {"rows": 0, "documents": 0, "tokens": 0, "supervised_tokens": 0, "truncated": 0, "dropped": 0}
        self._longest = 0
        self._packs = 0

    def add(self, found: Tokenised, rejects: Rejects) -> None:
        """Write a row's documents, those that fit; a row with none left is not written."""
        if found.error:
            rejects.add(found.row, found.error)
            return
        fitting = [kept for tokens, mask in self._pieces(found) if (kept := self._fit(tokens, mask, found.row, rejects))]
        for tokens, mask in fitting:
            self._documents.append(tokens, mask, found.row)
            self._lengths.append(len(tokens))
            self._counts["tokens"] += len(tokens)
            self._counts["supervised_tokens"] += int(mask[1:].sum())
        self._counts["documents"] += len(fitting)
        if fitting:
            self._rows.write(found.line)
            self._counts["rows"] += 1

    def _pieces(self, found: Tokenised) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The row's documents, long ones cut into several of like length where `data.overflow` says so."""
        for tokens, mask in found.documents:
            self._longest = max(self._longest, len(tokens))
            count = -(-len(tokens) // self.data.sequence_length) if self.data.overflow == "split" else 1
            yield from zip(np.array_split(tokens, count), np.array_split(mask, count), strict=True)

    def _fit(self, tokens: np.ndarray, mask: np.ndarray, row: int, rejects: Rejects) -> tuple[np.ndarray, np.ndarray] | None:
        """The document within the limit, or None after an entry in `rejects`."""
        limit = self.data.sequence_length
        if len(tokens) > limit:
            detail = f"{len(tokens)} tokens, expected at most {limit}"
            if self.data.overflow == "error":
                raise DataError(
                    f"data.overflow: error; row {row} of {self.name} has {detail}; raise data.sequence_length, drop or truncate"
                )
            if self.data.overflow == "drop":
                self._counts["dropped"] += 1
                rejects.add(row, RowError(TOO_LONG, detail), bad=False)
                return None
            self._counts["truncated"] += 1
            tokens, mask = tokens[:limit], mask[:limit]
        if not mask[1:].any():
            rejects.add(row, RowError("no supervised token", f"{len(tokens)} tokens, none of them to be learned"))
            return None
        return tokens, mask

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._rows.close()
        self._documents.close()
        if error[0] is None:
            self._write_packs()

    def _write_packs(self) -> None:
        packs = Writer(self._directory / f"{self.name}.packs.arrow", PACKS)
        for documents in self._grouped():
            packs.append(documents)
            self._packs += 1
        packs.close()

    def _grouped(self) -> Iterator[list[int]]:
        if self.data.packing:
            return pack_stream(self._lengths, capacity=self.data.sequence_length, seed=self.seed)
        return ([number] for number in range(len(self._lengths)))

    def stats(self) -> dict[str, Any]:
        """Counts, shares and lengths of what was written."""
        tokens = self._counts["tokens"]
        return {
            **self._counts,
            "packs": self._packs,
            "mask_share": self._counts["supervised_tokens"] / tokens if tokens else 0.0,
            "fill_rate": tokens / (self._packs * self.data.sequence_length) if self._packs else 0.0,
            "length": length_stats(self._lengths, longest=self._longest),
        }


def length_stats(lengths: Sequence[int], *, longest: int) -> dict[str, Any]:
    """Quantiles, and a histogram whose bins end at powers of two. `longest` is before anything was dropped or cut."""
    if not lengths:
        return {"longest_seen": longest}
    values = np.asarray(lengths)
    edges = [1 << power for power in range(int(values.min() - 1).bit_length(), int(values.max() - 1).bit_length() + 1)]
    counts = np.bincount(np.searchsorted(edges, values), minlength=len(edges))
    quantiles = np.quantile(values, [0, 0.5, 0.95, 1], method="nearest").tolist()
    return {
        **dict(zip(("min", "median", "p95", "max"), quantiles, strict=True)),
        "mean": float(values.mean()),
        "longest_seen": longest,
        "histogram": [{"up_to": edge, "documents": int(count)} for edge, count in zip(edges, counts, strict=True)],
    }
