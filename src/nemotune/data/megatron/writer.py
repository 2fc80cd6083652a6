"""Writes a dataset in Megatron's form: `PREFIX.bin` and `PREFIX.idx`, both whole or both absent. What they hold is said in `indexed.py`."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nemotune.data.megatron.indexed import DTYPES, HEADER, MAGIC, VERSION
from nemotune.errors import ConflictError, DataError
from nemotune.files import atomic_file

CODES = {dtype: code for code, dtype in DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every token fits, else int32: megatron-core's own choice."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedWriter:
    """Appends documents to an open .bin; 12 bytes a document stay in memory. `tokens` and `documents` count what was written."""

    def __init__(self, file: BinaryIO, dtype: np.dtype) -> None:
        if dtype not in CODES:
            raise DataError(f"dtype: got {dtype}, expected one of {', '.join(map(str, CODES))}")
        self._file, self._dtype = file, dtype
        self._lengths, self._documents = array("i"), array("q", [0])
        self.tokens = 0

    @property
    def documents(self) -> int:
        return len(self._documents) - 1

    def add(self, *sequences: Sequence[int] | np.ndarray) -> None:
        """One document, of one sequence or more. Raises DataError for a token that the dtype does not hold."""
        for sequence in sequences:
            given = np.asarray(sequence)
            tokens = given.astype(self._dtype)
            if not np.array_equal(tokens, given):
                raise DataError(f"{self._file.name}: a token does not fit into {self._dtype}, expected {np.iinfo(self._dtype)}")
            self._file.write(tokens.tobytes())
            self._lengths.append(len(tokens))
            self.tokens += len(tokens)
        self._documents.append(len(self._lengths))

    def write_index(self, path: Path) -> None:
        """Write the .idx of what was added."""
        lengths = np.frombuffer(self._lengths, dtype=np.intc)
        offsets = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        offsets *= self._dtype.itemsize
        with path.open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, CODES[self._dtype], len(lengths), len(self._documents)))
            for part in (lengths.astype("<i4"), offsets, np.frombuffer(self._documents, dtype=np.int64).astype("<i8")):
                file.write(part.data)


@contextmanager
def indexed_writer(prefix: str | Path, dtype: np.dtype | type | str, *, overwrite: bool = False) -> Iterator[IndexedWriter]:
    """Yield a writer; the two files get their names when the block ends without an error. Raises ConflictError where either exists."""
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    require_free(prefix, overwrite=overwrite)
    with atomic_file(idx_path) as idx, atomic_file(bin_path) as data:
        with data.open("wb") as file:
            writer = IndexedWriter(file, np.dtype(dtype))
            yield writer
        writer.write_index(idx)
        idx_path.unlink(missing_ok=True)  # the index comes last: one never stands beside tokens of another


def require_free(prefix: str | Path, *, overwrite: bool) -> None:
    """Raise ConflictError where a file of the dataset exists and may not be replaced."""
    taken = [path for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")) if path.exists()]
    if taken and not overwrite:
        raise ConflictError(f"{taken[0]}: already exists; name another prefix or pass --overwrite")
