"""`IndexedDataset`: documents of tokens in a pair of files, `PREFIX.bin` and `PREFIX.idx`, as Megatron-LM and NeMo write them; memory-mapped.

The .idx, little-endian:

    9 bytes           b"MMIDIDX\\0\\0"
    uint64            version, 1
    uint8             code of the tokens' dtype, see DTYPES
    uint64            N, the number of sequences
    uint64            D + 1, where D is the number of documents
    int32  [N]        tokens of each sequence
    int64  [N]        where each sequence begins in the .bin, in bytes
    int64  [D + 1]    first sequence of each document, then N

The .bin holds the sequences end to end. A document is one sequence, or several where it was split into sentences. What does not agree
with itself is refused, so that no token is read from a wrong place. In parity with megatron-core 0.16.1's `indexed_dataset`, both ways.
Not here: writing (`writer.py`), which documents are read when (`rows.py`).
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nemotune.errors import DataError, MissingFileError, did_you_mean

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {
    1: np.dtype("u1"), 2: np.dtype("i1"), 3: np.dtype("<i2"), 4: np.dtype("<i4"), 5: np.dtype("<i8"), 6: np.dtype("<f8"),
    7: np.dtype("<f4"), 8: np.dtype("<u2"),
}  # fmt: skip
CHUNK = 1 << 22  # entries of the index that are checked or hashed at a time
SAMPLES, SAMPLE_BYTES = 64, 1 << 14  # of the .bin, for its digest


class IndexedDataset:
    """`PREFIX.bin` and `PREFIX.idx`; `dataset[i]` is sequence i, `len(dataset)` counts sequences.

    dtype: of the tokens; lengths [N] int32, offsets [N] int64 (bytes), documents [D + 1] int64: the index, mapped.
    `verify` reads the whole index once; without it header and sizes are looked at, for files that were verified before.
    Raises MissingFileError, DataError.
    """

    def __init__(self, prefix: str | Path, *, verify: bool = True) -> None:
        self.prefix = str(prefix)
        self.idx_path, self.bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise MissingFileError(
                    f"{path}: no such file; a dataset is PREFIX.bin with PREFIX.idx, named by PREFIX.{_nearby(self.idx_path)}"
                )
        self.dtype, sequences = self._read_header()
        index = np.memmap(self.idx_path, dtype=np.uint8, mode="r")[HEADER.size :]
        self.lengths = index[: 4 * sequences].view("<i4")
        self.offsets = index[4 * sequences : 12 * sequences].view("<i8")
        self.documents = index[12 * sequences :].view("<i8")
        self._require_bin_size()
        if verify:
            self._verify()
        self.tokens = np.memmap(self.bin_path, dtype=self.dtype, mode="r") if self.bin_path.stat().st_size else np.empty(0, self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self.offsets[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens `start` to `end` of the .bin."""
        return self.tokens[start:end]

    def starts(self, start: int, end: int) -> np.ndarray:
        """Where documents begin from token `start` on and before `end`, int64, in order; an empty one begins where the next does.

        By bisection, so that the index is not read through (NumPy's searchsorted would copy it: the arrays are not aligned).
        """
        return self.offsets[self.documents[self._document_from(start) : self._document_from(end)]] // self.dtype.itemsize

    def count(self, start: int, end: int) -> int:
        """How many documents begin from token `start` on and before `end`."""
        return self._document_from(end) - self._document_from(start)

    def border(self, token: int) -> int:
        """Where the first document from `token` on begins; the end where none does."""
        sequence = int(self.documents[self._document_from(token)])
        return int(self.offsets[sequence]) // self.dtype.itemsize if sequence < len(self) else self.num_tokens

    def _document_from(self, token: int) -> int:
        return bisect_left(self.documents, bisect_left(self.offsets, token * self.dtype.itemsize))

    def digest(self) -> str:
        """A hash of the whole index and of samples of the .bin, which may be too long to read."""
        found = hashlib.blake2b(self.idx_path.read_bytes()[: HEADER.size], digest_size=16)
        for part in (self.lengths, self.offsets, self.documents):
            for at in range(0, len(part), CHUNK):
                found.update(part[at : at + CHUNK])
        for sample in self.samples():
            found.update(np.ascontiguousarray(sample))
        return found.hexdigest()

    def samples(self) -> Iterator[np.ndarray]:
        """Pieces of the .bin from all over it."""
        for at in np.linspace(0, self.num_tokens, SAMPLES, endpoint=False, dtype=np.int64).tolist():
            yield self.tokens[at : at + SAMPLE_BYTES // self.dtype.itemsize]

    def _read_header(self) -> tuple[np.dtype, int]:
        """dtype and number of sequences, as the header says and the file's size confirms."""
        with self.idx_path.open("rb") as file:
            head = file.read(HEADER.size)
        if head[:9] != MAGIC[: len(head)] or not head:
            raise self._broken(f"begins with {head[:9]!r}, expected {MAGIC!r}; it is no index of Megatron's")
        if len(head) < HEADER.size:
            raise self._broken(f"has {len(head)} bytes, expected a header of {HEADER.size}; it is cut off")
        _, version, code, sequences, entries = HEADER.unpack(head)
        if version != VERSION:
            raise self._broken(f"has version {version}, expected {VERSION}")
        if code not in DTYPES:
            raise self._broken(f"has dtype code {code}, expected {', '.join(f'{code} ({kind})' for code, kind in DTYPES.items())}")
        size, expected = self.idx_path.stat().st_size, HEADER.size + 12 * sequences + 8 * entries
        if size == expected + sequences and sequences:
            raise self._broken("holds a mode for each sequence: multimodal data, which is not read; write it without")
        if size != expected or not entries:
            raise self._broken(
                f"has {size:,} bytes, expected {expected:,} by its header ({sequences:,} sequences, {entries:,} document entries)"
            )
        return DTYPES[code], sequences

    def _require_bin_size(self) -> None:
        """The last sequence ends where the .bin ends."""
        size = self.bin_path.stat().st_size
        expected = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if len(self) else 0
        if size != expected:
            raise DataError(
                f"{self.bin_path}: has {size:,} bytes, expected {expected:,} by its .idx; it is cut off, or the two files are not of one dataset"
            )

    def _verify(self) -> None:
        """Lengths, offsets and documents agree: each sequence begins where the one before it ends."""
        end = 0
        for at in range(0, len(self), CHUNK):
            lengths = self.lengths[at : at + CHUNK].astype(np.int64)
            ends = end + np.cumsum(lengths) * self.dtype.itemsize
            wrong = (lengths < 0) | (self.offsets[at : at + CHUNK] != ends - lengths * self.dtype.itemsize)
            if wrong.any():
                bad = int(wrong.argmax())
                begins = int(ends[bad] - lengths[bad] * self.dtype.itemsize)
                raise self._broken(
                    f"sequence {at + bad} has {lengths[bad]} tokens from byte {self.offsets[at + bad]}, expected 0 or more from byte {begins}"
                )
            end = int(ends[-1])
        if self.documents[0] != 0 or self.documents[-1] != len(self):
            raise self._broken(f"its documents span sequences {self.documents[0]} to {self.documents[-1]}, expected 0 to {len(self)}")
        for at in range(0, self.num_documents, CHUNK):
            if (np.diff(self.documents[at : at + CHUNK + 1]) < 0).any():
                raise self._broken("its documents go backwards, expected each to begin where the one before it ends")

    def _broken(self, problem: str) -> DataError:
        return DataError(f"{self.idx_path}: {problem}. Write the dataset anew, with `nemotune data index` or Megatron's preprocess_data.py")


def _nearby(path: Path) -> str:
    found = [str(file.with_suffix("")) for file in path.parent.glob("*.idx")] if path.parent.is_dir() else []
    return did_you_mean(str(path.with_suffix("")), found)
