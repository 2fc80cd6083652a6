"""A directory of torch.distributed.checkpoint files as files of the streaming engine; `weights/dcp.py` reads it, as DCP and Megatron do.

A tensor is written in chunks, each of which is a `torch.save` of its own at its place in the whole; `.metadata` says where each of them lies.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from nemotune.export.stream import Buffer, Ends, OutputFile, Part
from nemotune.weights.dcp_metadata import dump_metadata

MAX_FILE_BYTES = 5_000_000_000
ABOUT = 1600  # bytes of an entry beside its values
Object = bytes  # the bytes of a torch.save of what is no tensor


@dataclass(frozen=True)
class ChunkToWrite:
    """`sizes` of the tensor `name` of `shape` from `offsets` on; `make` makes the values."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class DcpFiles:
    """What lies in which file, in order: chunks, and entries that are no tensors by their names."""

    directory: str
    files: dict[str, list[ChunkToWrite | tuple[str, Object]]]

    @classmethod
    def of(cls, directory: str, chunks: Iterable[ChunkToWrite], objects: Iterable[tuple[str, Object]]) -> DcpFiles:
        """Cut into files of about 5 GB; `directory` is where they go in the target."""
        files: list[list[ChunkToWrite | tuple[str, Object]]] = [list(objects)]
        used = 0
        for chunk in chunks:
            if used and used + chunk.num_bytes > MAX_FILE_BYTES:
                files.append([])
                used = 0
            used += chunk.num_bytes
            files[-1].append(chunk)
        return cls(directory, {f"{directory}/__0_{i}.distcp": entries for i, entries in enumerate(files)})

    def output_files(self) -> tuple[OutputFile, ...]:
        return tuple(OutputFile(name, tuple(_part(entry) for entry in entries)) for name, entries in self.files.items())

    def write_metadata(self, target: Path, ends: Ends) -> None:
        """Write `.metadata`, given where each entry ends in its file."""
        state: dict[str, Any] = {}
        places: dict[MetadataIndex, _StorageInfo] = {}
        for file, entries in self.files.items():
            start = 0
            for entry, end in zip(entries, ends[file], strict=True):
                places[_describe(entry, state)] = _StorageInfo(Path(file).name, start, end - start)
                start = end
        dump_metadata(Metadata(state_dict_metadata=state, storage_data=places, storage_meta=StorageMeta()), target / self.directory)


def saved(value: Any) -> bytes:
    """The bytes of a torch.save."""
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _part(entry: ChunkToWrite | tuple[str, Object]) -> Part:
    if isinstance(entry, ChunkToWrite):
        return Part(entry.name, entry.num_bytes + ABOUT, lambda: [partial(_bytes, entry)], is_exact=False)
    name, value = entry
    return Part(name, len(value), lambda: [lambda: value])


def _bytes(chunk: ChunkToWrite) -> Buffer:
    values = chunk.make()
    assert tuple(values.shape) == chunk.sizes and values.dtype == chunk.dtype, f"{chunk.name}: planned {chunk.sizes}, got {values.shape}"
    values = values.contiguous()
    if values.untyped_storage().nbytes() != chunk.num_bytes:
        values = values.clone()  # all of its storage is saved
    out = io.BytesIO()
    torch.save(values, out)
    return out.getbuffer()


def _describe(entry: ChunkToWrite | tuple[str, Object], state: dict[str, Any]) -> MetadataIndex:
    """Note an entry in `state`, and how `.metadata` calls it."""
    if not isinstance(entry, ChunkToWrite):
        state[entry[0]] = BytesStorageMetadata()
        return MetadataIndex(entry[0])
    whole = state.setdefault(entry.name, TensorStorageMetadata(TensorProperties(dtype=entry.dtype), Size(entry.shape), []))
    whole.chunks.append(ChunkStorageMetadata(Size(entry.offsets), Size(entry.sizes)))
    return MetadataIndex(entry.name, Size(entry.offsets))
