"""Blocks of tensors in a directory of torch.distributed.checkpoint files, which are data and never run as code.

A block lies at its place in the whole tensor, so whoever reads may hold other blocks than whoever wrote. Left to itself DCP unpickles
`.metadata` and entries that are no tensors, whatever they name. Here `.metadata` is read as data (`weights/dcp_metadata.py`), and there are
tensors alone, which DCP reads with weights_only. What is trusted is torch: its classes of metadata, and its reader of tensors.
"""

from __future__ import annotations

import errno
import io
import math
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Size, Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemotune.files import partial_path, staged_directory
from nemotune.weights.dcp_metadata import load_metadata

# It is meant where there is one process. For good, not around the call: what is ignored counts for all threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Block:
    """`values`, which lie from `offsets` on in the tensor `name` of `shape`."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor

    def on_host(self) -> Block:
        """A copy that nothing else writes to."""
        values = self.values.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return replace(self, values=values)


def write_blocks(blocks: Sequence[Block], target: Path, *, beside: Callable[[Path], None], group: Any = None) -> None:
    """Write `blocks`, and those of the other processes of `group`, as the directory `target`, which is there when all is written.

    The first process makes it, lets `beside` add its files, and renames it. Every process calls this; an error of one is raised in all.
    """
    with ExitStack() as stack:
        try:
            dcp.save(
                {}, storage_writer=_Writer(target, beside, stack), planner=_SavePlanner(blocks), process_group=group, no_dist=group is None
            )
        except dcp.api.CheckpointException as error:
            raise _cause(error) from error


def read_blocks(blocks: Sequence[Block], directory: Path) -> None:
    """Fill the blocks' values from `directory`. Raises ValueError, OSError or RuntimeError where they are not in it."""
    try:
        dcp.load({}, storage_reader=_Reader(directory), planner=_LoadPlanner(blocks), no_dist=True)
    except dcp.api.CheckpointException as error:
        raise _cause(error) from error


class _Writer(dcp.FileSystemWriter):
    """DCP's writer into a directory aside. What DCP calls in the first process alone makes the directory, and renames it."""

    def __init__(self, target: Path, beside: Callable[[Path], None], stack: ExitStack):
        super().__init__(partial_path(target), per_thread_copy_ahead=0)  # copying ahead would open the first GPU in every process
        self.target, self.beside, self.stack = target, beside, stack

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self.stack.enter_context(staged_directory(self.target, overwrite=True))
        return super().prepare_global_plan(plans)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        self.beside(self.path)
        self.stack.close()


class _SavePlanner(dcp.DefaultSavePlanner):
    """DCP's planner for blocks; that each lies in its tensor, and that together they fill it, is checked by DCP."""

    def __init__(self, blocks: Sequence[Block]):
        super().__init__(flatten_state_dict=False)
        self.blocks = _by_place(blocks)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(block) for block in self.blocks.values()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.blocks[index.fqn, tuple(index.offset)].values


class _Reader(dcp.FileSystemReader):
    """DCP's reader, with the metadata read safely, and before DCP would log an error of its own."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.metadata = load_metadata(directory)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """DCP's planner for blocks, each made of whatever blocks were written; nothing but tensors is read."""

    def __init__(self, blocks: Sequence[Block]):
        super().__init__(flatten_state_dict=False)
        self.blocks = _by_place(blocks)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        return LoadPlan([item for block in self.blocks.values() for item in _read_items(block, self.metadata)])

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.blocks[index.fqn, tuple(index.offset)].values

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("only tensors are planned")


def _by_place(blocks: Sequence[Block]) -> Mapping[tuple[str, tuple[int, ...]], Block]:
    return {(block.name, block.offsets): block for block in blocks}


def _write_item(block: Block) -> WriteItem:
    properties = TensorProperties.create_from_tensor(block.values)
    data = TensorWriteData(chunk=_chunk(block), properties=properties, size=Size(block.shape))
    return WriteItem(index=MetadataIndex(block.name, Size(block.offsets)), type=WriteItemType.SHARD, tensor_data=data)


def _read_items(block: Block, metadata: Metadata) -> list[ReadItem]:
    """What to read for `block`; together it fills it."""
    found = metadata.state_dict_metadata.get(block.name)
    if not isinstance(found, TensorStorageMetadata):
        raise ValueError(f"{block.name}: not in it")
    if tuple(found.size) != block.shape:
        raise ValueError(f"{block.name}: got shape {tuple(found.size)}, expected {block.shape}")
    items = create_read_items_for_chunk_list(block.name, found, [_chunk(block)])
    if sum(math.prod(item.lengths) for item in items) != block.values.numel():
        raise ValueError(f"{block.name}: not all of it is in it")
    return items


def _chunk(block: Block) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(Size(block.offsets), block.values.shape)


def _cause(error: dcp.api.CheckpointException) -> BaseException:
    """The first process's own error, a full disk before any other."""
    causes = [_plain(failure[0]) for _, failure in sorted(error.failures.items())]
    return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])


def _plain(cause: BaseException) -> BaseException:
    if isinstance(cause, RuntimeError) and "inline_container" in str(cause):  # torch's zip writer hides that the disk is full
        return OSError(errno.ENOSPC, str(cause))
    if isinstance(cause, pickle.UnpicklingError):
        return ValueError(str(cause))
    return cause
