"""A checkpoint directory of Megatron-Bridge, opened: which iteration, which tensors, which run_config.yaml. Nothing in it is run.

CKPT/latest_checkpointed_iteration.txt     CKPT/iter_0000000/{.metadata, __0_0.distcp, run_config.yaml, tokenizer/, ...}
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from nemotune.errors import CheckpointError, MissingFileError
from nemotune.export.megatron.rows import Rows
from nemotune.weights import is_finite
from nemotune.weights.dcp import METADATA, DcpDirectory, StoredTensor

LATEST, RUN_CONFIG, TOKENIZER = "latest_checkpointed_iteration.txt", "run_config.yaml", "tokenizer"
NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|.*\._extra_state(/|$)")  # what training and Transformer Engine keep beside them
ADAPTER = ".adapter."


@dataclass(frozen=True)
class MegatronCheckpoint:
    """One iteration of a checkpoint; `directory` is that iteration's own."""

    directory: Path
    iteration: str
    stored: DcpDirectory
    run_config: dict[str, Any]

    @cached_property
    def weights(self) -> dict[str, StoredTensor]:
        """Its tensors without those that are no part of a model."""
        return {name: tensor for name, tensor in self.stored.tensors.items() if not NOT_WEIGHTS.match(name)}

    @property
    def is_lora(self) -> bool:
        """Whether it holds adapters and no base."""
        return bool(self.weights) and all(ADAPTER in name for name in self.weights)

    @property
    def model(self) -> dict[str, Any]:
        """The provider's settings."""
        found = self.run_config.get("model")
        return found if isinstance(found, dict) else {}

    def rows(self, run: Rows) -> Tensor:
        """A run of rows of a tensor of it, or of an entry of a stack. Raises CheckpointError where a value is not finite."""
        shape = self.stored.tensors[run.name].shape
        tail = shape[1:] if run.entry is None else shape[2:]
        at = () if run.entry is None else (run.entry,)
        values = self.stored.read(run.name, (*at, run.first, *(0 for _ in tail)), (*(1 for _ in at), run.length, *tail))
        return finite(values.reshape(run.length, *tail), f"{self.directory}: {run.name}")


def open_megatron(path: Path) -> MegatronCheckpoint:
    """The checkpoint at `path`: its latest iteration, or the directory of one. Raises MissingFileError, CheckpointError."""
    directory = iteration_of(Path(path))
    return MegatronCheckpoint(directory, directory.name.removeprefix("iter_"), DcpDirectory(directory), _run_config(directory / RUN_CONFIG))


def is_megatron(path: Path) -> bool:
    """Whether `path` is a checkpoint of Megatron-Bridge, or one iteration of it."""
    return (path / LATEST).is_file() or (path / METADATA).is_file()


def iteration_of(path: Path) -> Path:
    """The directory of the latest iteration of the checkpoint at `path`, or `path` where it is one. Raises MissingFileError, CheckpointError."""
    if (path / METADATA).is_file():
        return path
    if not (path / LATEST).is_file():
        raise MissingFileError(f"{path}: no {LATEST} and no {METADATA}; expected a checkpoint of Megatron-Bridge, or one iteration of it")
    latest = (path / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"\d{1,12}|release", latest):
        raise CheckpointError(f"{path / LATEST}: got {latest[:40]!r}, expected the number of an iteration; copy it again")
    directory = path / (latest if latest == "release" else f"iter_{int(latest):07}")
    if not directory.is_dir():
        raise MissingFileError(f"{directory}: no such directory, {LATEST} names it; copy that iteration too, or name one that is there")
    return directory


def finite(values: Tensor, name: str) -> Tensor:
    """The values as they are. Raises CheckpointError where one is Inf or NaN."""
    if not is_finite(values):
        raise CheckpointError(f"{name}: holds values that are not finite; copy the checkpoint again, or take an earlier one")
    return values


def _run_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({str(error).splitlines()[0]}); copy it again, from whom you trust") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: got {type(found).__name__}, expected the settings of a run; copy it again")
    return found
