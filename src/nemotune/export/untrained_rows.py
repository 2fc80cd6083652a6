"""Rows of the embeddings, and of the head, that training never reached: found by their size, and set to the mean of the others.

A base may hold such rows for chat tokens that it has never seen. A norm divides by the size of its input, so the gradient through a row
near zero is thousands of times that of others, grows again in each block, and may end as Inf. Tables are read some rows at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemotune.errors import CheckpointError
from nemotune.files import staged_directory
from nemotune.models.base import CausalLM
from nemotune.models.config_json import read_config
from nemotune.models.disk_names import disk_pieces
from nemotune.models.loading import build_model, check_weights
from nemotune.weights import Checkpoint, TensorInfo, WritePlan, write_checkpoint

NEAR_ZERO = 1e-3  # of the median row's RMS; a fresh row has about the median, one that was trained more
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Table:
    """Embeddings or head: the names that its tensor has on disk (two where a tied head is stored as well), and the RMS of each row, fp32."""

    names: tuple[str, ...]
    rms_V: Tensor

    @property
    def median(self) -> float:
        return float(self.rms_V.median())

    @property
    def near_zero_V(self) -> Tensor:
        return self.rms_V <= NEAR_ZERO * self.median

    @property
    def near_zero(self) -> list[int]:
        """The ids of the tokens whose rows are near zero."""
        return self.near_zero_V.nonzero().flatten().tolist()


def open_tables(directory: Path) -> CausalLM:
    """The model in `directory` on the meta device, its checkpoint checked. Raises CheckpointError, MissingFileError, UnsupportedError."""
    model = build_model(read_config(directory))
    model.source = Checkpoint(directory)
    check_weights(model, model.source)
    return model


def scan(model: CausalLM, *, done: Callable[[int], None] = lambda _: None) -> dict[str, Table]:
    """`embeddings`, and `head` where it is a tensor of its own. `done` is told how many rows were read."""
    assert model.source is not None
    of_embeddings = next(name for name, parameter in model.named_parameters() if parameter is model.embeddings.weight)
    kinds = {of_embeddings: "embeddings", "lm_head.weight": "head"}
    names: dict[str, tuple[str, ...]] = {}
    for disk_name, (name, _) in disk_pieces(model):
        if name in kinds:
            names[kinds[name]] = (*names.get(kinds[name], ()), disk_name)
    return {kind: Table(on_disk, _rms_of_rows(model.source, on_disk[0], done)) for kind, on_disk in names.items()}


def num_rows(model: CausalLM) -> int:
    """How many rows `scan` reads."""
    return model.config.vocab_size * (1 if model.config.tie_word_embeddings else 2)


def repair(directory: Path, target: Path, *, done: Callable[[int], None] = lambda _: None) -> dict[str, Table]:
    """Write the model as `target`, each row near zero set to the mean of the others of its table; everything else keeps its bytes.

    The mean is where new tokens usually begin: it moves the other tokens' probabilities least (Hewitt 2021, "Initializing New Word
    Embeddings for Pretrained Language Models"). Returns the tables as they were found; where no row is near zero, nothing is written.
    Raises ConflictError where `target` exists, CheckpointError where the mean is near zero as well.
    """
    model = open_tables(directory)
    base = model.source
    assert base is not None
    found = {kind: table for kind, table in scan(model, done=done).items() if table.near_zero}
    means = {name: (table, _mean_of_others(base, table)) for table in found.values() for name in table.names}
    if not means:
        return found

    def read(info: TensorInfo) -> Tensor:
        weight_VD = base.read(info.name)
        if info.name in means:
            table, mean_D = means[info.name]
            weight_VD[table.near_zero_V] = mean_D.to(weight_VD.dtype)
        return weight_VD

    files = [file for file in sorted(directory.iterdir()) if file.is_file()]
    shards = {base.tensors[name].file for name in means}
    with staged_directory(target, needed_bytes=sum(file.stat().st_size for file in files)) as aside:
        write_checkpoint(aside, WritePlan(tuple(info for info in base.tensors.values() if info.file in shards)), read)
        for file in files:
            if file.name not in shards:
                shutil.copyfile(file, aside / file.name)
    return found


def _rms_of_rows(base: Checkpoint, name: str, done: Callable[[int], None]) -> Tensor:
    found = []
    for rows_ND in base.slices(name, ROWS_AT_ONCE):
        found.append(rows_ND.float().square().mean(-1).sqrt())
        done(len(rows_ND))
    return torch.cat(found)


def _mean_of_others(base: Checkpoint, table: Table) -> Tensor:
    """The mean of the rows that are not near zero, fp64 [D]."""
    sums, healthy_V = [], ~table.near_zero_V
    for rows_ND, healthy_N in zip(base.slices(table.names[0], ROWS_AT_ONCE), healthy_V.split(ROWS_AT_ONCE), strict=True):
        sums.append(rows_ND[healthy_N].sum(0, dtype=torch.float64))
    mean_D = torch.stack(sums).sum(0) / max(1, int(healthy_V.sum()))
    if mean_D.square().mean().sqrt() <= NEAR_ZERO * table.median:
        raise CheckpointError(
            f"{base.directory}: the mean of the rows of {table.names[0]} is near zero as well, so it repairs nothing; "
            "train the embeddings (method: full) on text that has these tokens"
        )
    return mean_D
