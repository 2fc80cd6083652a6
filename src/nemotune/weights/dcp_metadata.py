"""The `.metadata` of a torch.distributed.checkpoint directory as data: it may name the classes that DCP and Megatron write, and nothing else.

Left to itself DCP unpickles it, whatever it names. What is trusted is torch: those classes. What lies in the files is `dcp.py`'s.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

METADATA = ".metadata"  # DCP writes it last
WRITTEN_BY_DCP = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "TensorStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),  # plans kept
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),  # Python 3.13
}  # fmt: skip


class _OfMegatron(Metadata):
    """What older Megatron-LM names for its metadata: the same fields and some of its own, which are not needed."""


WRITTEN_BY_MEGATRON = {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _OfMegatron,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): type("MCoreSavePlan", (), {}),
}


def load_metadata(directory: Path) -> Metadata:
    """What DCP wrote of its files. Raises ValueError where it is damaged or names anything but the classes that are written into it."""
    with (directory / METADATA).open("rb") as file:
        try:
            found = _Unpickler(file).load()
        except _Refused:
            raise
        except Exception as error:  # a pickle that was cut off or overwritten may raise anything
            raise ValueError(f"{METADATA} is damaged: {error}") from error
    if not isinstance(found, Metadata):
        raise ValueError(f"{METADATA} holds {type(found).__name__}, expected torch's Metadata")
    return found


def dump_metadata(metadata: Metadata, directory: Path) -> None:
    """Write it as DCP does."""
    (directory / METADATA).write_bytes(pickle.dumps(metadata))


def require_files(directory: Path) -> None:
    """Raises OSError or ValueError where a file of `directory` is missing or of another length than was written."""
    ends: dict[str, int] = {}
    for place in (load_metadata(directory).storage_data or {}).values():
        ends[place.relative_path] = max(place.offset + place.length, ends.get(place.relative_path, 0))
    for name, expected in ends.items():
        if not (directory / name).is_file():
            raise ValueError(f"{name} is missing")
        if (got := (directory / name).stat().st_size) != expected:
            raise ValueError(f"{name} has {got} bytes, expected {expected}")


class _Refused(ValueError):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in WRITTEN_BY_MEGATRON:
            return WRITTEN_BY_MEGATRON[module, name]
        if name not in WRITTEN_BY_DCP.get(module, ()):
            raise _Refused(f"{METADATA} names {module}.{name}, which torch.distributed.checkpoint does not write")
        return super().find_class(module, name)
