"""Writes a safetensors directory tensor by tensor: headers first, from the plan, then each tensor as it comes.

Memory is one tensor, whatever the model's size. Callers stage the directory (`files.staged_directory`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from nemotune.weights.checkpoint import INDEX_FILE, SINGLE_FILE, TensorInfo
from nemotune.weights.dtypes import BYTES

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class WritePlan:
    """The tensors to write with their shards, in order."""

    tensors: tuple[TensorInfo, ...]

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors)

    @cached_property
    def by_file(self) -> dict[str, list[TensorInfo]]:
        """The tensors of each shard."""
        files: dict[str, list[TensorInfo]] = {}
        for info in self.tensors:
            files.setdefault(info.file, []).append(info)
        return files

    @classmethod
    def in_shards(cls, tensors: Iterable[tuple[str, str, tuple[int, ...]]], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> WritePlan:
        """A plan for (name, safetensors dtype, shape) in order, cut into shards of at most `max_shard_bytes`."""
        shard, used, rows = 0, 0, []
        for name, dtype, shape in tensors:
            size = math.prod(shape) * BYTES[dtype]
            if used and used + size > max_shard_bytes:
                shard, used = shard + 1, 0
            used += size
            rows.append((name, shard, dtype, shape))
        files = [SINGLE_FILE] if shard == 0 else [f"model-{i + 1:05}-of-{shard + 1:05}.safetensors" for i in range(shard + 1)]
        return cls(tuple(TensorInfo(name, files[i], dtype, shape) for name, i, dtype, shape in rows))


def write_checkpoint(
    directory: Path, plan: WritePlan, read: Callable[[TensorInfo], torch.Tensor], *, done: Callable[[int], None] = lambda _: None
) -> None:
    """Write every tensor of `plan` into `directory`; `read` gives each one, `done` is told the bytes of each one written."""
    for file, tensors in plan.by_file.items():
        with (directory / file).open("wb") as shard:
            shard.write(header(tensors))
            for info in tensors:
                shard.write(_bytes(read(info), info))
                done(info.num_bytes)
    write_index(directory, plan)


def write_index(directory: Path, plan: WritePlan) -> None:
    """Write the file that says which shard has which tensor, where there are several."""
    if len(plan.by_file) > 1:
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": {info.name: info.file for info in plan.tensors}}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def header(tensors: Sequence[TensorInfo]) -> bytes:
    """What a shard of `tensors` begins with."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in tensors:
        entries[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, offset + info.num_bytes]}
        offset += info.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: torch.Tensor, info: TensorInfo) -> memoryview:
    assert tuple(tensor.shape) == info.shape, f"{info.name}: planned {info.shape}, got {tuple(tensor.shape)}"
    flat = tensor.detach().to("cpu", info.torch_dtype).contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
