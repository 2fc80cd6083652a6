"""Reading a GGUF file back: names, shapes, types and places of all its tensors, and the values of some, against what was to be written.

This needs no llama.cpp; whether one runs the file, and what it answers, is `check.py`'s.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize

from nemotune.errors import CheckpointError
from nemotune.export.gguf.names import GGUFTensor

SAMPLED = 64
# Root mean square of what packing may change of a row, to that of its values: half an ulp; half a step of a block's range, of 2^bits steps, which
# is at most sqrt(32) of its values' root mean square (one of 32 that is not zero), twice that for steps that are themselves rounded.
ERROR = {"F32": 2**-24, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.025, "Q6_K": 0.09, "Q5_K": 0.18, "Q5_1": 0.18, "Q5_0": 0.18, "Q4_K": 0.36}


@dataclass(frozen=True)
class ReadBack:
    """What was read back."""

    tensors: int
    sampled: int
    worst: float  # of the sampled tensors' rows, what packing changed, to the row's values


def check_structure(path: Path, tensors: Sequence[GGUFTensor], types: Mapping[str, GGMLQuantizationType]) -> ReadBack:
    """Read the file back. Raises CheckpointError where a tensor is not as it should be."""
    try:
        found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path}: cannot be read back ({error}); nothing was kept. Export again") from error
    wanted = {tensor.name: (tensor.shape[::-1], types[tensor.name]) for tensor in tensors}
    got = {name: (tuple(int(size) for size in tensor.shape), tensor.tensor_type) for name, tensor in found.items()}
    if wrong := sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name)):
        raise CheckpointError(f"{path}: {len(wrong)} tensors are not as planned, first {wrong[0]}; nothing was kept. Export again")
    sample = random.Random(0).sample(list(tensors), min(SAMPLED, len(tensors)))
    errors = {tensor.name: _error(tensor, found[tensor.name].data, types[tensor.name]) for tensor in sample}
    bad = [name for name, error in errors.items() if not error <= ERROR[types[name].name]]
    if bad:
        raise CheckpointError(
            f"{path}: {len(bad)} of {len(sample)} tensors read back are not base + adapter, first {bad[0]} (off by {errors[bad[0]]:.2g}, at most "
            f"{ERROR[types[bad[0]].name]:g}); nothing was kept. Export again; if it repeats, disk or memory is at fault"
        )
    return ReadBack(len(got), len(sample), max(errors.values()))


def _error(tensor: GGUFTensor, data: np.ndarray, kind: GGMLQuantizationType) -> float:
    """Of the first or last rows of a tensor, the row that packing changed most: the change's root mean square to that of the row's values."""
    is_last = len(tensor.name) % 2
    values = tensor.pieces()[-is_last]().reshape(-1, tensor.shape[-1]).float()
    packed = data.reshape(-1, data.shape[-1])
    rows = np.array(packed[-len(values) :] if is_last else packed[: len(values)])
    plain = kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
    read = torch.from_numpy(rows).float() if plain else torch.from_numpy(dequantize(rows, kind))
    least = values.square().mean().sqrt() / 16  # f16 has few bits for rows near zero
    scale = values.square().mean(1).sqrt().clamp(min=torch.finfo(torch.float32).tiny).clamp(min=least)
    return float(((read - values).square().mean(1).sqrt() / scale).max())
