"""GGML's tensor types: rows of weights to the bytes of a GGUF tensor, equal to llama.cpp's byte for byte.

`quantize` is pure and may be called by many threads at once, with one intra-op thread each. Which tensor gets which type, and the file itself, are
not here; dequantisers are the `gguf` package's (`gguf.quants.dequantize`), which has none of the quantisers of the K types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nemotune.errors import CheckpointError
from nemotune.export.gguf.quants.blocks import quantize_q5_0, quantize_q5_1, quantize_q8_0
from nemotune.export.gguf.quants.k_quants import Q4_K, Q5_K, quantize_k
from nemotune.export.gguf.quants.q6_k import quantize_q6_k
from nemotune.weights import is_finite

__all__ = ["KINDS", "block_bytes", "block_length", "quantize", "row_bytes"]


@dataclass(frozen=True)
class Kind:
    """`block` values become `num_bytes`. `pack` takes float32 [blocks, block]; a plain dtype needs none."""

    block: int
    num_bytes: int
    pack: Callable[[Tensor], Tensor] | None = None
    dtype: torch.dtype | None = None
    chunk: int = 1 << 18  # values at a time: large enough that calls cost little, small enough for the caches


KINDS = {
    "F32": Kind(1, 4, dtype=torch.float32),
    "F16": Kind(1, 2, dtype=torch.float16),
    "BF16": Kind(1, 2, dtype=torch.bfloat16),
    "Q8_0": Kind(32, 34, quantize_q8_0),
    "Q5_0": Kind(32, 22, quantize_q5_0),
    "Q5_1": Kind(32, 24, quantize_q5_1),
    "Q4_K": Kind(256, 144, partial(quantize_k, grid=Q4_K)),
    "Q5_K": Kind(256, 176, partial(quantize_k, grid=Q5_K)),
    "Q6_K": Kind(256, 210, quantize_q6_k),
}


def block_length(kind: str) -> int:
    """Values in one block: a row's length must be a multiple."""
    return KINDS[kind].block


def block_bytes(kind: str) -> int:
    return KINDS[kind].num_bytes


def row_bytes(kind: str, row_length: int) -> int:
    """Bytes of a row of `row_length` values. Raises ValueError where that is no multiple of the kind's block."""
    if row_length % KINDS[kind].block:
        raise ValueError(f"{kind} packs blocks of {KINDS[kind].block} values; a row of {row_length} is not a multiple")
    return row_length // KINDS[kind].block * KINDS[kind].num_bytes


def quantize(rows: Tensor, kind: str, *, through: torch.dtype | None = torch.float16) -> np.ndarray:
    """uint8 [..., row_bytes] of `rows` [..., row_length] in float32, float16 or bfloat16.

    A quantised kind rounds its values to `through` first: llama.cpp's own path writes a float16 file and quantises that. None: as they are.
    F32, F16 and BF16 are made of the rows themselves.

    Raises CheckpointError where a value, rounded so, is not finite: the formats cannot hold it, and llama.cpp gives bytes that stand for nothing.
    """
    packing = KINDS[kind]
    width = row_bytes(kind, rows.shape[-1])
    packed = np.empty((*rows.shape[:-1], width), np.uint8)
    values, out = rows.detach().reshape(-1, packing.block), torch.from_numpy(packed).view(-1, packing.num_bytes)
    step = packing.chunk // packing.block
    with torch.inference_mode(), np.errstate(all="ignore"):  # sums of huge values overflow, as in C
        for start in range(0, len(values), step):
            part = values[start : start + step]
            out[start : start + step] = _plain(part, packing.dtype) if packing.pack is None else packing.pack(_rounded(part, through))
    return packed


def _plain(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    assert dtype is not None
    return _finite(values.to(dtype)).contiguous().view(torch.uint8)


def _rounded(values: Tensor, through: torch.dtype | None) -> Tensor:
    """float32. By way of float32 also to float16: from bfloat16 torch is slow."""
    values = values.float()
    return _finite(values if through is None else values.to(through)).float().contiguous()


def _finite(values: Tensor) -> Tensor:
    if not is_finite(values):
        raise CheckpointError(
            f"{int((~values.isfinite()).sum())} of {values.numel()} values are not finite as {values.dtype}. Expected finite weights. Look for the "
            "checkpoint's overflow or corruption, or export f32 or bf16, which hold larger numbers than f16"
        )
    return values
