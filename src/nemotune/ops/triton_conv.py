"""`conv.causal_conv1d` as one Triton kernel forward and one backward, for CUDA; the PyTorch path and the reference are in `conv.py`.

x is read in place, channels last and rows of any stride: a slice of in_proj's output needs no copy. Saved for the backward are the
inputs alone. Factors are widened to fp32 and summed there. No atomics: a block of tokens leaves its part of the weights' gradient, and
the parts are added in order, so that results repeat to the bit. Import on use only: Triton need not be there.

BT tokens and BC channels of a block; W taps, of which tap j meets the input j tokens ago.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotune.ops.documents import Documents

BT, BC = 32, 64


def causal_conv1d(x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, documents: Documents) -> Tensor:
    """See `conv.causal_conv1d`. [T, C]."""
    return _CausalConv1d.apply(x_TC, weight_CW, bias_C, documents.positions_T)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, positions_T: Tensor) -> Tensor:
        x_TC, weight_CW = _in_rows(x_TC), weight_CW.contiguous()
        ctx.save_for_backward(x_TC, weight_CW, bias_C, positions_T)
        return conv_forward(x_TC, weight_CW, bias_C, positions_T)

    @staticmethod
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x_TC, weight_CW, bias_C, positions_T = ctx.saved_tensors
        (T, C), W = x_TC.shape, weight_CW.shape[1]
        grad_TC, grad_x_TC = _in_rows(grad_TC), x_TC.new_empty(T, C)
        trained = any(ctx.needs_input_grad[1:3])
        parts = x_TC.new_empty(triton.cdiv(T, BT), W + 1, C, dtype=torch.float32) if trained else None  # the taps, then the bias
        _backward[_grid(T, C)](
            x_TC, x_TC.stride(0), weight_CW, bias_C, positions_T, grad_TC, grad_TC.stride(0), grad_x_TC, parts, T, C, W=W, BT=BT, BC=BC
        )
        if parts is None:
            return grad_x_TC, None, None, None
        *taps, of_bias_C = parts.sum(0).unbind(0)
        of_weight_CW = torch.stack(taps, dim=1).to(weight_CW.dtype) if ctx.needs_input_grad[1] else None
        return grad_x_TC, of_weight_CW, of_bias_C.to(bias_C.dtype) if ctx.needs_input_grad[2] else None, None


def try_on(device: torch.device) -> None:
    """One token through the forward kernel: raises whatever keeps Triton from compiling and launching there."""
    x_TC, positions_T = torch.zeros(1, BC, device=device), torch.zeros(1, dtype=torch.long, device=device)
    with torch.cuda.device(device):
        conv_forward(x_TC, torch.zeros(BC, 4, device=device), None, positions_T)


def conv_forward(x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, positions_T: Tensor) -> Tensor:
    """The forward alone, of x in rows. `positions_T` int64: of each token in its document."""
    (T, C), W = x_TC.shape, weight_CW.shape[1]
    y_TC = x_TC.new_empty(T, C)
    _forward[_grid(T, C)](x_TC, x_TC.stride(0), weight_CW, bias_C, positions_T, y_TC, T, C, W=W, BT=BT, BC=BC)
    return y_TC


def _grid(T: int, C: int) -> tuple[int, int]:
    return triton.cdiv(T, BT), triton.cdiv(C, BC)


def _in_rows(x_TC: Tensor) -> Tensor:
    """The same values, neighbouring channels side by side in memory."""
    return x_TC if x_TC.stride(1) == 1 else x_TC.contiguous()


@triton.jit
def _forward(x, x_stride, weight, bias, positions, y, T, C, W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    t = tl.program_id(0) * BT + tl.arange(0, BT).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    sum_TC = _before_silu(x, x_stride, weight, bias, positions, t, c, T, C, W)
    y_TC = sum_TC * tl.sigmoid(sum_TC)
    tl.store(y + t[:, None] * C + c[None, :], y_TC.to(y.dtype.element_ty), mask=(t < T)[:, None] & (c < C)[None, :])


@triton.jit
def _backward(
    x, x_stride, weight, bias, positions, grad, grad_stride, grad_x, parts, T, C, W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """The input of token t was met by tap j at token t + j, if that is of the same document; silu's slope is computed again there."""
    t = tl.program_id(0) * BT + tl.arange(0, BT).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    grad_x_TC = tl.zeros((BT, BC), tl.float32)
    for j in tl.static_range(W):
        later = t + j
        reached = (later < T) & (tl.load(positions + later, mask=later < T, other=0) >= j)
        grad_TC = tl.load(grad + later[:, None] * grad_stride + c[None, :], mask=reached[:, None] & (c < C)[None, :], other=0.0)
        sum_TC = _before_silu(x, x_stride, weight, bias, positions, later, c, T, C, W)
        sigmoid_TC = tl.sigmoid(sum_TC)
        slope_TC = sigmoid_TC * (1 + sum_TC * (1 - sigmoid_TC))
        grad_sum_TC = tl.where(reached[:, None], grad_TC.to(tl.float32) * slope_TC, 0.0)  # a NaN of the next document stays there
        grad_x_TC += grad_sum_TC * _tap(weight, j, c, C, W)[None, :]
        if j == 0 and parts is not None:
            part = parts + tl.program_id(0).to(tl.int64) * (W + 1) * C + c
            for k in tl.static_range(W):
                tl.store(part + (W - 1 - k) * C, tl.sum(grad_sum_TC * _input(x, x_stride, positions, t, c, k, T, C), 0), mask=c < C)
            tl.store(part + W * C, tl.sum(grad_sum_TC, 0), mask=c < C)
    tl.store(grad_x + t[:, None] * C + c[None, :], grad_x_TC.to(grad_x.dtype.element_ty), mask=(t < T)[:, None] & (c < C)[None, :])


@triton.jit
def _before_silu(x, x_stride, weight, bias, positions, t, c, T, C, W: tl.constexpr):
    """`bias + sum_j weight[W - 1 - j] x[t - j]`."""
    sum_TC = tl.zeros((t.shape[0], c.shape[0]), tl.float32)
    if bias is not None:
        sum_TC += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(W):
        sum_TC += _input(x, x_stride, positions, t, c, j, T, C) * _tap(weight, j, c, C, W)[None, :]
    return sum_TC


@triton.jit
def _input(x, x_stride, positions, t, c, j, T, C):
    """x[t - j], zero before the document begins."""
    inside = (t < T) & (tl.load(positions + t, mask=t < T, other=-1) >= j)
    return tl.load(x + (t - j)[:, None] * x_stride + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _tap(weight, j, c, C, W: tl.constexpr):
    return tl.load(weight + c * W + (W - 1 - j), mask=c < C, other=0.0).to(tl.float32)
