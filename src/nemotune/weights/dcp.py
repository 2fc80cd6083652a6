"""A directory of torch.distributed.checkpoint files, opened by its `.metadata`: names, shapes and dtypes, and any part of a tensor.

Whoever wrote it may have been many processes: a tensor lies in chunks, each at its place in the whole, each an entry of its own
(`torch.save`) in a run of bytes of some file. All of it is data: `.metadata` is read as `dcp_metadata.py` does, entries with weights_only,
and every place is held against the files. Read-only; `export/megatron/dcp_files.py` and `train/storage.py` write.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from nemotune.errors import CheckpointError, MissingFileError
from nemotune.weights.dcp_metadata import METADATA, load_metadata


@dataclass(frozen=True)
class Chunk:
    """`sizes` of a tensor from `offsets` on, an entry of `length` bytes from `start` on in `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int

    def overlap(self, offsets: Sequence[int], sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """First index (in the whole) and size of what it shares with a box, dim by dim; sizes may be 0."""
        first = tuple(max(a, b) for a, b in zip(self.offsets, offsets, strict=True))
        ends = (min(a + m, b + n) for a, m, b, n in zip(self.offsets, self.sizes, offsets, sizes, strict=True))
        return first, tuple(max(0, end - begin) for begin, end in zip(first, ends, strict=True))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as `.metadata` describes it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    def covers(self, offsets: Sequence[int], sizes: Sequence[int]) -> bool:
        """Whether its chunks hold all of a box, each value once."""
        return sum(math.prod(chunk.overlap(offsets, sizes)[1]) for chunk in self.chunks) == math.prod(sizes)


class DcpDirectory:
    """The tensors of a DCP directory by name, and the names of its other entries (`objects`), which are never read.

    Raises MissingFileError where there is no `.metadata` or a file of it is missing, CheckpointError where it is damaged, names anything
    but what DCP and Megatron write, or places an entry outside of the directory's files.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        if not (self.directory / METADATA).is_file():
            raise MissingFileError(f"{self.directory}: no {METADATA}; expected a directory as torch.distributed.checkpoint writes it")
        try:
            metadata = load_metadata(self.directory)
            places = _places(metadata)
            self.objects = frozenset(name for name, of in metadata.state_dict_metadata.items() if isinstance(of, BytesStorageMetadata))
            self.tensors = {
                name: _stored(name, of, places)
                for name, of in metadata.state_dict_metadata.items()
                if isinstance(of, TensorStorageMetadata)
            }
        except CheckpointError:
            raise
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise CheckpointError(f"{self.directory}: {error}; copy the checkpoint again, from whom you trust") from error
        self._check_files(places.values())

    def read(self, name: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> Tensor:
        """The box of the tensor called `name` that begins at `offsets`, the whole otherwise, put together from its chunks.

        Raises CheckpointError where the chunks do not hold all of it, or an entry is not what `.metadata` says.
        """
        stored = self.tensors[name]
        offsets, sizes = offsets or (0,) * len(stored.shape), stored.shape if sizes is None else sizes
        if not stored.covers(offsets, sizes):
            raise CheckpointError(f"{self.directory}: {name}: its chunks do not fill {list(sizes)} from {list(offsets)} on; copy all files")
        found = [(chunk, *chunk.overlap(offsets, sizes)) for chunk in stored.chunks]
        found = [(chunk, first, shared) for chunk, first, shared in found if math.prod(shared)]
        if any(math.prod(one.overlap(other.offsets, other.sizes)[1]) for (one, *_), (other, *_) in combinations(found, 2)):
            raise CheckpointError(
                f"{self.directory}: {name}: its chunks lie over one another and do not fill it; copy the checkpoint again"
            )
        if len(found) == 1:
            return self._part(stored, *found[0])
        whole = torch.empty(tuple(sizes), dtype=stored.dtype)
        for chunk, first, shared in found:
            at = tuple(slice(begin - start, begin - start + size) for begin, start, size in zip(first, offsets, shared, strict=True))
            whole[at] = self._part(stored, chunk, first, shared)
        return whole

    def _part(self, stored: StoredTensor, chunk: Chunk, first: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """`sizes` from `first` (in the whole) on, of one chunk; of the file only the rows that hold them are read."""
        begin = tuple(a - b for a, b in zip(first, chunk.offsets, strict=True))
        dim = next((dim for dim, size in enumerate(sizes) if size > 1), len(sizes))  # before it single indices, along it a run of rows
        row = math.prod(chunk.sizes[dim + 1 :])
        start = sum(index * math.prod(chunk.sizes[at + 1 :]) for at, index in enumerate(begin[: dim + 1]))
        count = sizes[dim] if dim < len(sizes) else 1
        shape = (*(1 for _ in sizes[:dim]), *((count,) if dim < len(sizes) else ()), *chunk.sizes[dim + 1 :])
        path = self.directory / chunk.file
        try:
            values = _values(path, chunk, stored.dtype, start, count * row)
        except Exception as error:  # torch and zipfile raise whatever a damaged entry makes them
            raise CheckpointError(f"{path}: {stored.name}: cannot be read ({_reason(error)}); copy the checkpoint again") from error
        inner = tuple(slice(a, a + n) for a, n in zip(begin[dim + 1 :], sizes[dim + 1 :], strict=True))
        return values.view(shape)[(..., *inner)] if inner else values.view(shape)

    def _check_files(self, places: Any) -> None:
        ends: dict[str, int] = {}
        for file, start, length in places:
            ends[file] = max(start + length, ends.get(file, 0))
        for file, end in ends.items():
            path = self.directory / file
            if not path.is_file():
                raise MissingFileError(f"{path}: is missing, {METADATA} names it; copy all files of the checkpoint")
            if (got := path.stat().st_size) < end:
                raise CheckpointError(f"{path}: has {got} bytes, {METADATA} says at least {end}; copy it again")


class _Span(io.RawIOBase):
    """So many bytes of a file, as a file."""

    def __init__(self, file: Any, start: int, length: int):
        self.file, self.start, self.length, self.at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self.length - self.at))
        self.file.seek(self.start + self.at)
        count = self.file.readinto(memoryview(buffer)[:wanted])
        self.at += count
        return count


def _values(path: Path, chunk: Chunk, dtype: torch.dtype, start: int, count: int) -> Tensor:
    """`count` values from `start` on, of the entry's tensor in row-major order, in memory of their own."""
    with path.open("rb", buffering=0) as file:
        span = _Span(file, chunk.start, chunk.length)
        with torch.serialization.skip_data():  # the tensor without its values
            tensor = torch.load(span, weights_only=True)
        if type(tensor) is not Tensor or tensor.shape != chunk.sizes or tensor.dtype != dtype:
            raise ValueError(f"an entry is {_kind(tensor)}, expected {dtype} {list(chunk.sizes)}")
        record = next(info for info in zipfile.ZipFile(span).infolist() if info.filename.endswith("/data/0"))
        span.seek(record.header_offset)
        header = span.read(30)
        place = record.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        size, first = tensor.numel() * dtype.itemsize, tensor.storage_offset() * dtype.itemsize
        if not tensor.is_contiguous() or record.compress_type != zipfile.ZIP_STORED or record.file_size < first + size:
            span.seek(0)
            return torch.load(span, weights_only=True).contiguous().flatten()[start : start + count]
        values = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        span.seek(place + first + start * dtype.itemsize)
        left = memoryview(values.numpy())
        while left:
            if not (got := span.readinto(left)):
                raise EOFError(f"{len(left)} bytes are missing")
            left = left[got:]
    return values.view(dtype)


def _places(metadata: Metadata) -> dict[MetadataIndex, tuple[str, int, int]]:
    """Where each entry lies: file, first byte, length. Raises ValueError for what leaves the directory, or is no place."""
    found = {}
    for index, place in (metadata.storage_data or {}).items():
        file, start, length = place.relative_path, place.offset, place.length
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{METADATA} names the file {file!r}, expected one of this directory")
        if not all(isinstance(number, int) and number >= 0 for number in (start, length)):
            raise ValueError(f"{METADATA} places {index.fqn} at {start!r}, {length!r} bytes")
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{index.fqn} is stored transformed ({place.transform_descriptors}), which is not supported")
        found[index] = (file, start, length)
    return found


def _stored(name: str, of: TensorStorageMetadata, places: dict[MetadataIndex, tuple[str, int, int]]) -> StoredTensor:
    shape, dtype, chunks = _sizes(of.size), of.properties.dtype, []
    for chunk in of.chunks:
        offsets, sizes = _sizes(chunk.offsets), _sizes(chunk.sizes)
        place = places.get(MetadataIndex(name, torch.Size(offsets))) or (places.get(MetadataIndex(name)) if sizes == shape else None)
        if place is None:
            raise ValueError(f"{METADATA} says nothing of where {name} from {list(offsets)} on lies")
        if any(at + size > end for at, size, end in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"{name}: a chunk of {list(sizes)} from {list(offsets)} on leaves its shape {list(shape)}")
        if math.prod(sizes) * dtype.itemsize > place[2]:
            raise ValueError(f"{name}: a chunk of {list(sizes)} is said to lie in {place[2]} bytes")
        chunks.append(Chunk(offsets, sizes, *place))
    return StoredTensor(name, shape, dtype, tuple(chunks))


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(values)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(f"{METADATA} has {sizes} for a shape")
    return sizes


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
