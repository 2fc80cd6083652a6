"""Trained parameters and optimiser in a directory of torch.distributed.checkpoint files, which are data and never run as code.

Left to itself DCP unpickles `.metadata`, and every entry that is no tensor, whatever they name. Here `.metadata` may name the classes that
DCP writes into it and nothing else, and the entries are read with weights_only, as DCP reads tensors. What is trusted is torch: those
classes, and its reader of tensors. Which directories are checkpoints is in `checkpoint.py`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from nemotune.errors import CheckpointError
from nemotune.models import CausalLM
from nemotune.models.nemotron_h import Router

METADATA = ".metadata"  # DCP writes it last
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
WRITTEN_BY_DCP = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "TensorStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),  # Python 3.13
}  # fmt: skip


def save_state(model: CausalLM, optimizer: Optimizer, directory: Path) -> None:
    """Write what is trained, the correction biases of trained routers, and the optimiser's state."""
    try:
        with _quiet():
            dcp.save(_state(model, optimizer), checkpoint_id=str(directory), no_dist=True)
    except dcp.api.CheckpointException as error:  # it wraps each process's own error: here there is one
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, RuntimeError) and "inline_container" in str(cause):  # torch's zip writer hides that the disk is full
            raise OSError(errno.ENOSPC, str(cause)) from error
        raise cause from error


def load_state(model: CausalLM, optimizer: Optimizer, directory: Path) -> None:
    """Give model and optimiser what `directory` holds. Raises CheckpointError where it is damaged, of another run or no mere data."""
    try:
        reader, state = _Reader(directory), _state(model, optimizer)
        with _quiet():
            dcp.load(state, storage_reader=reader, planner=_Planner(), no_dist=True)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=TRAINED_ONLY)
    except torch.OutOfMemoryError:
        raise  # which no other checkpoint mends
    except (RuntimeError, ValueError, OSError, KeyError, pickle.UnpicklingError, dcp.api.CheckpointException) as error:
        raise CheckpointError(str(error).strip().splitlines()[-1]) from error


def load_metadata(directory: Path) -> Metadata:
    """What DCP wrote of its files. Raises UnpicklingError where it is damaged or names anything but DCP's own classes."""
    with (directory / METADATA).open("rb") as file:
        try:
            found = _Unpickler(file).load()
        except pickle.UnpicklingError:
            raise
        except Exception as error:  # a pickle that was cut off or overwritten may raise anything
            raise pickle.UnpicklingError(f"{METADATA} is damaged: {error}") from error
    if not isinstance(found, Metadata):
        raise pickle.UnpicklingError(f"{METADATA} holds {type(found).__name__}, expected torch's Metadata")
    return found


class _Reader(dcp.FileSystemReader):
    """DCP's reader, with the metadata read safely, and before DCP would log an error of its own."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.metadata = load_metadata(directory)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class _Planner(dcp.DefaultLoadPlanner):
    """DCP's planner, but an entry that is no tensor is read with weights_only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], torch.load(value, weights_only=True))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in WRITTEN_BY_DCP.get(module, ()):
            raise pickle.UnpicklingError(f"{METADATA} names {module}.{name}, which torch.distributed.checkpoint does not write")
        return super().find_class(module, name)


def _state(model: CausalLM, optimizer: Optimizer) -> dict[str, Any]:
    parameters, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    routers = {name for name, module in model.named_modules() if isinstance(module, Router) and module.weight.requires_grad}
    trained |= {f"{name}.e_score_correction_bias" for name in routers}  # which no optimiser moves, but `balance.py` may
    return {"model": {name: value for name, value in parameters.items() if name in trained}, "optimizer": moments}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.distributed.checkpoint warns that it runs in one process: so it is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed.*")
        yield
