"""RMSNorm (arXiv 1910.07467) and Mamba-2's gated group RMSNorm. Statistics and the weight product are fp32 whatever the input.

The fp32 values last for the call: what is kept for the backward are the inputs in their own dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dim, in the dtype of `x`."""
    if x.is_cuda and weight.dtype == x.dtype:  # one kernel, fp32 inside
        return F.rms_norm(x, weight.shape, weight, eps)
    return _GatedGroupNorm.apply(x, None, weight, 1, eps)


def gated_group_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, num_groups: int, eps: float) -> Tensor:
    """`x * silu(gate)`, then RMSNorm over each of `num_groups` equal parts of the last dim: the gate comes first."""
    return _GatedGroupNorm.apply(x, gate, weight, num_groups, eps)


class _GatedGroupNorm(torch.autograd.Function):
    """`gate` None gates nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, num_groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.num_groups, ctx.eps = num_groups, eps
        normed, _ = _normed(x, gate, num_groups, eps)
        return normed.flatten(-2).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gate, weight = ctx.saved_tensors
        normed, inverse_rms = _normed(x, gate, ctx.num_groups, ctx.eps)
        grad = grad.float()
        grad_weight = (grad * normed.flatten(-2)).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        grad = (grad * weight).view_as(normed)
        along = (grad * normed).mean(-1, keepdim=True)  # growing along `normed` changes nothing
        grad = ((grad - normed * along) * inverse_rms).flatten(-2)
        if gate is None:
            return grad.to(x.dtype), None, grad_weight, None, None
        grad_gate = torch.ops.aten.silu_backward(grad * x, gate.float()).to(gate.dtype)
        return (grad * F.silu(gate.float())).to(x.dtype), grad_gate, grad_weight, None, None


def _normed(x: Tensor, gate: Tensor | None, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Before the weight: fp32 [..., groups, D / groups], and 1 / rms of each group."""
    gated = x.float() if gate is None else F.silu(gate.float()) * x
    grouped = gated.unflatten(-1, (num_groups, -1))
    inverse_rms = grouped.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return grouped * inverse_rms, inverse_rms


def gated_group_rms_norm_ref(x: Tensor, gate: Tensor, weight: Tensor, *, num_groups: int, eps: float) -> Tensor:
    """`gated_group_rms_norm` in PyTorch's own operations."""
    grouped = (x.float() * F.silu(gate.float())).unflatten(-1, (num_groups, -1))
    return (F.rms_norm(grouped, grouped.shape[-1:], None, eps).flatten(-2) * weight.float()).to(x.dtype)
