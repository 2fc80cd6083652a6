"""A base and what an adapter makes of it, tensor by tensor under the names on disk: the one source of every export.

An adapted tensor is read, updated in fp32 and rounded once to its own dtype; every other one is the base's. Large ones come some rows at a
time, always the same ones, so that each export sees the same values. Nothing is written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.export.stream import fingerprint
from nemotune.lora.adapter import read_adapter
from nemotune.lora.pairs import Adapter
from nemotune.models.base import CausalLM
from nemotune.models.config_json import read_config
from nemotune.models.disk_names import disk_pieces
from nemotune.models.loading import build_model, check_weights
from nemotune.weights import Checkpoint, TensorInfo, is_finite

PIECE_NUMEL = 2**18  # of a tensor at once


@dataclass(frozen=True)
class Tuned:
    """A model directory, opened by its headers, and the adapter on top of it, if any; `updates` has the module and expert of each adapted tensor."""

    directory: Path
    base: Checkpoint
    model: CausalLM
    adapter_dir: Path | None
    adapter: Adapter | None
    updates: Mapping[str, tuple[str, int | None]]

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor by its name on disk, those that no forward uses (`mtp.*`) too."""
        return self.base.tensors

    @property
    def identity(self) -> dict[str, Any]:
        """What decides every value."""
        read = [self.directory] if self.adapter_dir is None else [self.directory, self.adapter_dir]
        return {"read": fingerprint(*read)}

    def pieces(self, name: str) -> list[Callable[[], Tensor]]:
        """The tensor's rows in order, each call some of them; one of no or one dim is a single piece."""
        info = self.infos[name]
        if len(info.shape) < 2 or not info.num_bytes:
            return [partial(self.rows, name, 0, None)]
        return [partial(self.rows, name, start, stop) for start, stop in self.row_ranges(name)]

    def row_ranges(self, name: str) -> list[tuple[int, int]]:
        """The first row of each piece of a matrix, and the one after its last."""
        shape = self.infos[name].shape
        step = max(1, PIECE_NUMEL // math.prod(shape[1:]))
        return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        pieces = self.pieces(name)
        return pieces[0]() if len(pieces) == 1 else torch.cat([piece() for piece in pieces])

    def rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """Rows `start` to `stop` of a tensor, or all of it where `stop` is None, in its dtype on disk. Raises CheckpointError where a value is not finite."""
        weight = self.base.read(name) if stop is None else self.base.read_rows(name, start, stop)
        if name in self.updates:
            assert self.adapter is not None
            module, expert = self.updates[name]
            weight = self.adapter.updated(weight, module, expert, start=start).to(weight.dtype)
        if not is_finite(weight):
            raise CheckpointError(
                f"{self.directory}: {name}{' with its adapter' * (name in self.updates)} holds values that are not finite, which no export keeps; "
                "copy the weights again, or train with a lower train.learning_rate"
            )
        return weight


def open_tuned(directory: Path, adapter_dir: Path | None = None, *, read: Callable[[Path, CausalLM], Adapter] = read_adapter) -> Tuned:
    """The model in `directory` with the adapter (in the form that `read` reads), every name and shape checked.

    Raises CheckpointError, MissingFileError, UnsupportedError.
    """
    base = Checkpoint(directory)
    model = build_model(read_config(directory))
    model.source = base
    check_weights(model, base)
    if adapter_dir is None:
        return Tuned(directory, base, model, None, None, {})
    adapter = read(adapter_dir, model)
    if model.config.tie_word_embeddings and "lm_head" in adapter.pairs:
        raise UnsupportedError(
            "lora.targets: lm_head is tied to the embeddings of this model, so it cannot be merged; use the adapter as it is"
        )
    updates = {}
    for disk_name, (name, index) in disk_pieces(model):
        if name.endswith(".weight") and (module := name.removesuffix(".weight")) in adapter.pairs:
            updates[disk_name] = (module, index)
    return Tuned(directory, base, model, adapter_dir, adapter, updates)
