"""RMSNorm (arXiv 1910.07467) and Mamba-2's gated group RMSNorm. Statistics and the weight product are fp32 whatever the input."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dim, in the dtype of `x`."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def gated_group_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, num_groups: int, eps: float) -> Tensor:
    """`x * silu(gate)`, then RMSNorm over each of `num_groups` equal parts of the last dim: the gate comes first."""
    gated = x.float() * F.silu(gate.float())
    grouped = gated.unflatten(-1, (num_groups, -1))
    return (F.rms_norm(grouped, grouped.shape[-1:], None, eps).flatten(-2) * weight.float()).to(x.dtype)
