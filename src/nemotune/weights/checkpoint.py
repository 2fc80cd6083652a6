"""A directory of safetensors shards, opened by its headers: names, shapes and dtypes are known before a byte of a tensor is read.

Format: https://huggingface.co/docs/safetensors. Read-only; `writer.py` is the other direction.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemotune.errors import CheckpointError, MissingFileError
from nemotune.weights.dtypes import BYTES, TORCH_DTYPES

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its shard's header describes it; `dtype` is the safetensors name, such as BF16."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]


class Checkpoint:
    """The weights of one model directory, in the order of its shards; or those of `files` in it, where they have other names.

    Raises MissingFileError where there is no shard or one of the index is missing, CheckpointError where a shard
    cannot be read or holds other names than the index says.
    """

    def __init__(self, directory: Path, files: Sequence[str] = ()):
        self.directory = Path(directory)
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, int] = {}  # of the first byte of each tensor in its file
        file_of = {} if files else self._index.get("weight_map", {})
        for file in files or self._shard_files():
            self._read_header(file, file_of)
        if not files:
            self._check_index()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`, on the CPU, in the dtype that it has on disk."""
        info = self.tensors[name]
        return self._values(info, 0, info.num_bytes).view(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Its rows `start` to `stop` along dim 0; nothing else of it is read."""
        info = self.tensors[name]
        row_bytes = info.num_bytes // info.shape[0]
        return self._values(info, start * row_bytes, (stop - start) * row_bytes).view(stop - start, *info.shape[1:])

    def slices(self, name: str, num_rows: int) -> Iterator[torch.Tensor]:
        """The tensor called `name`, so many of its rows at a time: only those are in memory."""
        end = self.tensors[name].shape[0]
        for start in range(0, end, num_rows):
            yield self.read_rows(name, start, min(start + num_rows, end))

    def _values(self, info: TensorInfo, first: int, num_bytes: int) -> torch.Tensor:
        """So many bytes of the tensor as its values, read into memory of their own: pages of a mapped file count as the process's until it is closed."""
        path, values = self.directory / info.file, torch.empty(num_bytes, dtype=torch.uint8)
        left = memoryview(values.numpy())
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(self._places[info.name] + first)
                while left:
                    if not (count := file.readinto(left)):
                        raise EOFError(f"{len(left)} bytes of {info.name} are missing")
                    left = left[count:]
        except (OSError, EOFError) as error:
            raise CheckpointError(_unreadable(path, error)) from error
        return values.view(info.torch_dtype)

    @cached_property
    def _index(self) -> dict[str, Any]:
        path = self.directory / INDEX_FILE
        if not path.is_file():
            return {}
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            outside = sorted(file for file in set(index["weight_map"].values()) if Path(file).name != file)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(_unreadable(path, error)) from error
        if outside:
            raise CheckpointError(f"{path}: weight_map names {outside[0]!r}, expected file names of this directory")
        return index

    def _shard_files(self) -> list[str]:
        if not self.directory.is_dir():
            raise MissingFileError(f"{self.directory}: no such directory; expected one that holds config.json and *.safetensors")
        if self._index:
            files = sorted(set(self._index["weight_map"].values()))
        else:
            files = [SINGLE_FILE] if (self.directory / SINGLE_FILE).is_file() else []
        if not files:
            raise MissingFileError(f"{self.directory}: no {SINGLE_FILE} and no {INDEX_FILE}; only safetensors weights are read")
        missing = [file for file in files if not (self.directory / file).is_file()]
        if missing:
            raise MissingFileError(
                f"{self.directory}: {len(missing)} of {len(files)} shards are missing, first {missing[0]}; copy them or download again"
            )
        return files

    def _read_header(self, file: str, file_of: Mapping[str, str]) -> None:
        """Note the tensors of a shard; `file_of` says of which one a tensor that lies in several is taken."""
        path, found = self.directory / file, []
        try:
            with safe_open(path, "pt") as shard:
                for name in shard.offset_keys():
                    view = shard.get_slice(name)
                    found.append(TensorInfo(name, file, view.get_dtype(), tuple(view.get_shape())))
            places = _places(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(_unreadable(path, error)) from error
        for info in found:
            if info.dtype not in BYTES:
                raise CheckpointError(f"{path}: {info.name}: {info.dtype}, expected one of {', '.join(BYTES)}; use the BF16 release")
            if file_of.get(info.name, file) == file:
                self.tensors[info.name], self._places[info.name] = info, places[info.name]

    def _check_index(self) -> None:
        if not self._index:
            return
        promised = set(self._index["weight_map"])
        if lost := sorted(promised - set(self.tensors)):
            raise CheckpointError(
                f"{self.directory / INDEX_FILE}: names {len(lost)} tensors that their shards do not hold, first {lost[0]}; download again"
            )


def _places(path: Path) -> dict[str, int]:
    """Where in the file each tensor begins: eight bytes of the header's length, the header, the tensors. The library has checked that they fit."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path}: cannot be read ({error}); the file is truncated or not what it says. Copy or download it again"
