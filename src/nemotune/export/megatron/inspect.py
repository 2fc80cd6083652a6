"""What a Megatron checkpoint holds, and what it lacks for the model that it looks like: read from its metadata, no tensor is."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from nemotune.errors import CheckpointError, MissingFileError, NemotuneError
from nemotune.export.megatron.checkpoint import NOT_WEIGHTS, RUN_CONFIG, TOKENIZER, MegatronCheckpoint, open_megatron
from nemotune.export.megatron.homes import extra_states
from nemotune.export.megatron.lora import read_lora
from nemotune.export.megatron.to_hf import hf_side, open_export
from nemotune.models.config_json import read_config
from nemotune.models.loading import build_model
from nemotune.weights.dtypes import NAMES

BESIDE = ("common.pt", "metadata.json", "train_state.pt", RUN_CONFIG, TOKENIZER)
NUMBER = re.compile(r"(?<=layers\.)\d+(?=\.)")


@dataclass(frozen=True)
class Row:
    """Tensors of one name but for the layer's number, one shape and one dtype."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


@dataclass(frozen=True)
class Inspected:
    """`model` is what it was compared with, None where nothing is known of it; `problems` is what it lacks, or does not fit, in words."""

    checkpoint: MegatronCheckpoint
    rows: tuple[Row, ...]
    model: str | None
    facts: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(row.num_bytes for row in self.rows)


def inspect(path: Path, hf_dir: Path | None = None) -> Inspected:
    """The checkpoint at `path`, compared with the model of `hf_dir`, or of the config.json that its run knows."""
    checkpoint = open_megatron(path)
    try:
        source: Path | None = hf_dir or hf_side(checkpoint)
    except MissingFileError:
        source = None
    if source is None:
        facts, problems = [], [f"no config.json in {TOKENIZER}/ and none where {RUN_CONFIG} says: --hf names the model to compare with"]
    elif checkpoint.is_lora:
        facts, problems = _compared_lora(checkpoint, source)
    else:
        facts, problems = _compared(checkpoint, hf_dir)
    missing = [name for name in BESIDE if not (checkpoint.directory / name).exists() and not _need_not_be(name, checkpoint)]
    problems += [f"{name}: not there; Megatron-Bridge reads it" for name in missing]
    others = {name: tensor for name, tensor in checkpoint.stored.tensors.items() if NOT_WEIGHTS.match(name)}
    if others:
        size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in others.values())
        facts.append(f"beside the weights {len(others)} tensors of the optimizer, {size / 1e9:.2f} GB, which no conversion needs")
    return Inspected(checkpoint, _rows(checkpoint), source and str(source), tuple(facts), tuple(problems))


def _compared(checkpoint: MegatronCheckpoint, hf_dir: Path | None) -> tuple[list[str], list[str]]:
    try:
        export = open_export(checkpoint, hf_dir)
    except CheckpointError as error:
        return [], _lines(error)
    states = set(extra_states(each.home for each in export.fitted))
    lost = sorted(states - checkpoint.stored.objects)
    problems = [f"{len(lost)} _extra_state entries are missing, which Megatron's strict loading wants, first {lost[0]}"] if lost else []
    facts = [f"every tensor of {export.model.family} is there, in its shape, with {len(states) - len(lost)} _extra_state entries"]
    return [*facts, *export.notes], problems


def _compared_lora(checkpoint: MegatronCheckpoint, source: Path) -> tuple[list[str], list[str]]:
    try:
        adapter = read_lora(checkpoint.directory, build_model(read_config(source)))
    except NemotuneError as error:
        return [], _lines(error)
    ranks = sorted({its.rank for its in adapter.settings.values()})
    return [
        f"a LoRA checkpoint: {len(adapter.settings)} modules adapted, rank {', '.join(map(str, ranks))}, alpha {adapter.lora.alpha:g}"
    ], []


def _rows(checkpoint: MegatronCheckpoint) -> tuple[Row, ...]:
    counts: dict[tuple[str, tuple[int, ...], str], int] = {}
    sizes: dict[tuple[str, tuple[int, ...], str], int] = {}
    for name, tensor in checkpoint.weights.items():
        key = (NUMBER.sub("*", name), tensor.shape, NAMES.get(tensor.dtype, str(tensor.dtype)))
        counts[key] = counts.get(key, 0) + 1
        sizes[key] = sizes.get(key, 0) + math.prod(tensor.shape) * tensor.dtype.itemsize
    return tuple(Row(name, count, shape, dtype, sizes[name, shape, dtype]) for (name, shape, dtype), count in counts.items())


def _need_not_be(name: str, checkpoint: MegatronCheckpoint) -> bool:
    """Newer ones keep what was in common.pt among the entries, and LoRA checkpoints leave the tokenizer to their base."""
    newer = any(entry.startswith("common_state/") for entry in checkpoint.stored.objects)
    return (name == "common.pt" and newer) or (name == TOKENIZER and checkpoint.is_lora)


def _lines(error: Exception) -> list[str]:
    return [line.strip() for line in str(error).splitlines()]
