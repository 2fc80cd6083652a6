"""RMSNorm (arXiv 1910.07467) and Mamba-2's gated group RMSNorm. Statistics and the weight product are fp32 whatever the input.

The fp32 values last for a stretch of the row, which a core's cache holds: what is kept for the backward are the inputs in their own dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 2**17  # values: half a megabyte in fp32, with as much for each of the steps in between


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dim, in the dtype of `x`."""
    if x.is_cuda and weight.dtype == x.dtype:  # one kernel, fp32 inside
        return F.rms_norm(x, weight.shape, weight, eps)
    return _over_rows(x, None, weight, num_groups=1, eps=eps)


def gated_group_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, num_groups: int, eps: float) -> Tensor:
    """`x * silu(gate)`, then RMSNorm over each of `num_groups` equal parts of the last dim: the gate comes first."""
    return _over_rows(x, gate, weight, num_groups=num_groups, eps=eps)


def _over_rows(x: Tensor, gate: Tensor | None, weight: Tensor, *, num_groups: int, eps: float) -> Tensor:
    y: Tensor = _GatedGroupNorm.apply(x.flatten(0, -2), None if gate is None else gate.flatten(0, -2), weight, num_groups, eps)
    return y if y.shape == x.shape else y.view(x.shape)  # FSDP warns of modules that return views


class _GatedGroupNorm(torch.autograd.Function):
    """Over x [T, D]; `gate` None gates nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, num_groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.num_groups, ctx.eps = num_groups, eps
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for rows in _stretches(x):
            normed, _ = _normed(x[rows], None if gate is None else gate[rows], num_groups, eps)
            y[rows] = normed.flatten(-2).mul_(weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gate, weight = ctx.saved_tensors
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for rows in _stretches(x):
            gate_rows, grad_rows = None if gate is None else gate[rows].float(), grad[rows].float()
            normed, inverse_rms = _normed(x[rows], gate_rows, ctx.num_groups, ctx.eps)
            if grad_weight is not None:
                grad_weight += (grad_rows * normed.flatten(-2)).sum(0)
            grad_rows = (grad_rows * weight).view_as(normed)
            along = (grad_rows * normed).mean(-1, keepdim=True)  # growing along `normed` changes nothing
            grad_rows = grad_rows.sub_(normed.mul_(along)).mul_(inverse_rms).flatten(-2)
            if gate_rows is not None and grad_gate is not None:
                grad_gate[rows] = torch.ops.aten.silu_backward(grad_rows * x[rows], gate_rows)
                grad_rows *= F.silu(gate_rows)
            grad_x[rows] = grad_rows
        return grad_x, grad_gate, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _stretches(x_TD: Tensor) -> list[slice]:
    """Rows to work off at a time: on the CPU as many as its cache holds in fp32."""
    size = max(1, AT_ONCE // x_TD.shape[1]) if x_TD.device.type == "cpu" else max(1, len(x_TD))
    return [slice(start, start + size) for start in range(0, len(x_TD), size)]


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
