"""`Split`: one split of prepared data as it lies on disk, memory-mapped; and the writer of those files.

Three files in a directory: `train.jsonl` (the processed rows), `train.documents.arrow` (tokens, mask, row of each document) and
`train.packs.arrow` (which documents share a packed row). A document is what the model sees as one text; a conversation gives
several where its template rewrites history. Not here: how documents come to be (`prepare.py`) or batches (`loader.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from nemotune.data.example import Example
from nemotune.errors import DataError

DOCUMENTS = pa.schema([("tokens", pa.list_(pa.int32())), ("mask", pa.list_(pa.bool_())), ("row", pa.int64())])
PACKS = pa.schema([("documents", pa.list_(pa.int64()))])
BATCH_ROWS = 1024  # rows of one Arrow record batch: what a writer holds in memory


@dataclass(frozen=True)
class Document:
    """tokens [T] int32; mask [T] bool, True where the token itself is a trained target; row: 0-based number in its source."""

    tokens: np.ndarray
    mask: np.ndarray
    row: int


class Split:
    """Documents, packs and rows of `directory/<name>.*`, read on use; `split[i]` is a Document, `len(split)` counts documents."""

    in_order = False  # the loader shuffles the packs

    def __init__(self, directory: Path, name: str) -> None:
        self.directory, self.name = Path(directory), name
        self._documents = _Table(self.directory / f"{name}.documents.arrow")
        self.packs: Sequence[np.ndarray] = _Packs(self.directory / f"{name}.packs.arrow")

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        batch, at = self._documents.locate(index)
        tokens, mask, row = batch.columns
        return Document(_values(tokens, at), _values(mask, at), row[at].as_py())

    def examples(self) -> Iterator[Example]:
        """The processed rows, in source order."""
        with (self.directory / f"{self.name}.jsonl").open("rb") as file:
            for line in file:
                yield Example.from_json(line)


class _Table:
    """An Arrow file whose rows are found by number without reading it."""

    def __init__(self, path: Path) -> None:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: unreadable ({error}); delete {path.parent} and the cache (NEMOTUNE_CACHE, else ~/.cache/nemotune), then prepare it again"
            ) from error
        self._ends = np.cumsum([batch.num_rows for batch in self.batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, index: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.batches[number], index - int(self._ends[number]) + self.batches[number].num_rows


class _Packs(Sequence[np.ndarray]):
    """The document numbers of each packed row; one each where packing is off."""

    def __init__(self, path: Path) -> None:
        self._table = _Table(path)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        batch, at = self._table.locate(index)
        return _values(batch.column(0), at)


def _values(column: pa.ListArray, index: int) -> np.ndarray:
    start, end = column.offsets[index].as_py(), column.offsets[index + 1].as_py()
    return column.values.slice(start, end - start).to_numpy(zero_copy_only=False)


class Writer:
    """Appends rows of `schema` to an Arrow file, a record batch at a time."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema, self._rows = schema, []
        self._file = pa.ipc.new_file(pa.OSFile(str(path), "wb"), schema)

    def append(self, *values: object) -> None:
        self._rows.append(values)
        if len(self._rows) >= BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(column, type=kind) for column, kind in zip(columns, self._schema.types, strict=True)]
        self._file.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._file.close()
