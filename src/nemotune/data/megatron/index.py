"""What `nemotune data index` does: rows of text to a dataset in Megatron's form, tokenised in parallel, in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from nemotune.data.example import RowError
from nemotune.data.formats.text import convert
from nemotune.data.megatron.encoders import DocumentEncoder
from nemotune.data.megatron.writer import indexed_writer, token_dtype
from nemotune.data.progress import progress
from nemotune.data.sources import count_rows, iter_rows, size_of
from nemotune.data.workers import count_cpus, in_processes
from nemotune.errors import DataError
from nemotune.recipe.schema import Source

CHUNK_ROWS = 64
WORKER_BYTES = 4 << 20  # of files, that keep one process busy for longer than it takes to start
SHOWN = 5  # rows named for each reason


@dataclass
class Indexed:
    """What was written, and how many rows hold no text, by reason, with the numbers of the first."""

    documents: int = 0
    tokens: int = 0
    skipped: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    def skip(self, row: int, reason: str) -> None:
        """Count a row that is not used."""
        count, rows = self.skipped.get(reason, (0, []))
        self.skipped[reason] = (count + 1, rows if len(rows) == SHOWN else [*rows, row])

    def told(self) -> list[str]:
        """A line for each reason."""
        return [
            f"{count:,} rows left out: {reason}: row {', '.join(map(str, rows))}{', ...' if count > len(rows) else ''}"
            for reason, (count, rows) in self.skipped.items()
        ]


def index_texts(
    sources: Sequence[str],
    prefix: Path,
    encode: DocumentEncoder,
    *,
    text_key: str | None,
    workers: int | None = None,
    overwrite: bool = False,
) -> Indexed:
    """Write `prefix`.bin and .idx, one document for each row with a text, both whole or absent.

    The text is the row's `text_key`; None: `text` or `content`. Raises DataError where no row has one, MissingFileError, ConflictError.
    """
    found = Indexed()
    total = sum_or_none([count_rows(Source(path=source)) for source in sources])
    rows = chain.from_iterable(iter_rows(Source(path=source)) for source in sources)
    with indexed_writer(prefix, token_dtype(encode.encoder.vocab_size), overwrite=overwrite) as writer:
        with progress(f"indexing {prefix.name}", total=total) as advance:
            texts = _texts(rows, found, text_key=text_key, advance=advance)
            for tokens in _encoded(texts, encode, workers or _workers(sources)):
                writer.add(tokens)
        found.documents, found.tokens = writer.documents, writer.tokens
        if not found.documents:
            raise DataError("\n".join([f"{', '.join(sources)}: no row has a text; name its key with --text-key", *found.told()]))
    return found


def sum_or_none(counts: list[int | None]) -> int | None:
    """The sum; None where a part of it is not known."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _texts(rows: Iterator[dict[str, Any]], found: Indexed, *, text_key: str | None, advance: Callable[[int], None]) -> Iterator[str]:
    for number, row in enumerate(rows):
        advance(1)
        try:
            yield convert(row if text_key is None else {"text": row[text_key]} if text_key in row else {}).completion
        except RowError as error:
            found.skip(number, error.reason)


def _encoded(texts: Iterator[str], encode: DocumentEncoder, workers: int) -> Iterator[list[int]]:
    chunks = iter(lambda: list(islice(texts, CHUNK_ROWS)), [])
    if workers > 1:
        yield from in_processes(chunks, encode, workers)
    else:
        yield from chain.from_iterable(map(encode, chunks))


def _workers(sources: Sequence[str]) -> int:
    """As many processes as the files are worth, up to one for each processor."""
    size = sum_or_none([size_of(Source(path=source)) for source in sources])
    return count_cpus() if size is None else min(count_cpus(), 1 + size // WORKER_BYTES)
