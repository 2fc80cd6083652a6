"""A directory of safetensors shards, opened by its headers: names, shapes and dtypes are known before a byte of a tensor is read.

Format: https://huggingface.co/docs/safetensors. Read-only; `writer.py` is the other direction.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
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
    """The weights of one model directory, in the order of its shards.

    Raises MissingFileError where there is no shard or one of the index is missing, CheckpointError where a shard
    cannot be read or holds other names than the index says.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.tensors: dict[str, TensorInfo] = {}
        self._shard = lru_cache(maxsize=1)(self._open)  # tensors are read shard by shard: one open file is enough
        for file in self._shard_files():
            self._read_header(file)
        self._check_index()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`, on the CPU, in the dtype that it has on disk."""
        info = self.tensors[name]
        try:
            return self._shard(info.file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(_unreadable(self.directory / info.file, error)) from error

    def slices(self, name: str, num_rows: int) -> Iterator[torch.Tensor]:
        """The tensor called `name`, so many of its rows at a time: only those are in memory."""
        info = self.tensors[name]
        try:
            whole = self._shard(info.file).get_slice(name)
            for start in range(0, info.shape[0], num_rows):
                yield whole[start : start + num_rows]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(_unreadable(self.directory / info.file, error)) from error

    def close(self) -> None:
        """Let go of the shard that was read last: its pages count as the process's own. A later `read` opens it again."""
        self._shard.cache_clear()

    def _open(self, file: str) -> Any:
        return safe_open(self.directory / file, "pt")

    @cached_property
    def _index(self) -> dict[str, Any]:
        path = self.directory / INDEX_FILE
        if not path.is_file():
            return {}
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            files = set(index["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(_unreadable(path, error)) from error
        if outside := sorted(file for file in files if Path(file).name != file):
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

    def _read_header(self, file: str) -> None:
        try:
            with safe_open(self.directory / file, "pt") as shard:
                for name in shard.offset_keys():
                    view = shard.get_slice(name)
                    self.tensors[name] = TensorInfo(name, file, view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(_unreadable(self.directory / file, error)) from error

    def _check_index(self) -> None:
        if not self._index:
            return
        promised = set(self._index["weight_map"])
        if lost := sorted(promised - set(self.tensors)):
            raise CheckpointError(
                f"{self.directory / INDEX_FILE}: names {len(lost)} tensors that no shard holds, first {lost[0]}; download again"
            )


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path}: cannot be read ({error}); the file is truncated or not what it says. Copy or download it again"
