"""Rotary position embedding (arXiv 2104.09864), rotate-half layout, with the llama3 frequency scaling of Llama 3.1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch: wavelengths over `original / low` are divided by `factor`, under `original / high` kept, blended between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | float | None = None) -> Tensor:
    """Angles per position, fp32 [head_dim / 2]. `scaling`: llama3's, a linear factor, or none."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return frequencies
    if not isinstance(scaling, Llama3Scaling):
        return frequencies / scaling
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # turns within the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotary(positions_T: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position's angles, fp32 [T, head_dim]."""
    angles = (positions_T.float().unsqueeze(-1) * frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def apply_rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """x with each pair (i, i + H / 2) turned by its position's angle."""
    first, second = x_TNH.chunk(2, dim=-1)
    cos, sin = cos_TH.unsqueeze(1).to(x_TNH.dtype), sin_TH.unsqueeze(1).to(x_TNH.dtype)
    return x_TNH * cos + torch.cat([-second, first], dim=-1) * sin
