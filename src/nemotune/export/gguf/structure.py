"""Reading a GGUF file back: its header, with names, shapes, types and places of all tensors, and the values of some, against what was to be written.

This needs no llama.cpp; whether one runs the file, and what it answers, is `check.py`'s.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize

from nemotune.errors import CheckpointError
from nemotune.export.gguf.names import GGUFTensor
from nemotune.export.gguf.quants import row_bytes
from nemotune.export.gguf.types import aligned, num_bytes_of

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


def check_structure(path: Path, head: bytes, tensors: Sequence[GGUFTensor], types: Mapping[str, GGMLQuantizationType]) -> ReadBack:
    """Read the file back: `head`, its length, and rows of some tensors. Raises CheckpointError where one is not as it should be."""
    ends = list(accumulate((aligned(num_bytes_of(tensor, types[tensor.name])) for tensor in tensors), initial=len(head)))
    with path.open("rb") as file:
        if file.read(len(head)) != head or path.stat().st_size != ends[-1]:
            raise CheckpointError(f"{path}: its header or its length is not as planned; nothing was kept. Export again")
        sample = random.Random(0).sample(list(zip(tensors, ends, strict=False)), min(SAMPLED, len(tensors)))
        errors = {tensor.name: _error(file, start, tensor, types[tensor.name]) for tensor, start in sample}
    bad = [name for name, error in errors.items() if not error <= ERROR[types[name].name]]
    if bad:
        raise CheckpointError(
            f"{path}: {len(bad)} of {len(sample)} tensors read back are not base + adapter, first {bad[0]} (off by {errors[bad[0]]:.2g}, at most "
            f"{ERROR[types[bad[0]].name]:g}); nothing was kept. Export again; if it repeats, disk or memory is at fault"
        )
    return ReadBack(len(tensors), len(sample), max(errors.values()))


def _error(file: IO[bytes], start: int, tensor: GGUFTensor, kind: GGMLQuantizationType) -> float:
    """Of the first or last rows of a tensor, the row that packing changed most: the change's root mean square to that of the row's values."""
    is_last = len(tensor.name) % 2
    values = tensor.pieces()[-is_last]().reshape(-1, tensor.shape[-1]).float()
    width = row_bytes(kind.name, tensor.shape[-1])
    file.seek(start + is_last * (num_bytes_of(tensor, kind) - len(values) * width))
    rows = np.frombuffer(file.read(len(values) * width), np.uint8).reshape(len(values), width)
    read = torch.from_numpy(dequantize(rows, kind).astype(np.float32))
    least = values.square().mean().sqrt() / 16  # f16 has few bits for rows near zero
    scale = values.square().mean(1).sqrt().clamp(min=torch.finfo(torch.float32).tiny).clamp(min=least)
    return float(((read - values).square().mean(1).sqrt() / scale).max())
