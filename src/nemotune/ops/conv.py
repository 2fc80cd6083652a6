"""The short causal depthwise convolution of Mamba, over a packed row: a document never sees the one before it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotune.ops.documents import Documents
from nemotune.ops.kernels import uses_triton

AT_ONCE = 2**18  # values: 1 MB in fp32, what a core's cache holds


def causal_conv1d(x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, documents: Documents) -> Tensor:
    """`y[t] = silu(bias + sum_i weight[i] x[t - (W - 1) + i])`, x being zero before its document begins. Returns [T, C].

    Sums in fp32, rounded once; a stretch of a document at a time, whose sum the backward computes again: only the inputs are kept.
    """
    if uses_triton(x_TC.device):
        from nemotune.ops import triton_conv

        return triton_conv.causal_conv1d(x_TC, weight_CW, bias_C, documents)
    return _CausalConv.apply(x_TC, weight_CW, bias_C, documents.chunks(max(1, AT_ONCE // x_TC.shape[1])))


class _CausalConv(torch.autograd.Function):
    """`chunks`: of each document, the rows of its stretches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_CW: Tensor, bias_C: Tensor | None, chunks: list[list[slice]]) -> Tensor:
        ctx.save_for_backward(x, weight_CW, bias_C)
        ctx.chunks = chunks
        taps_WC = weight_CW.T.float().contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for of_document in chunks:
            for rows in of_document:
                y[rows] = F.silu(_slide(_window(x, rows, of_document[0].start, len(taps_WC)), taps_WC, bias_C))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight_CW, bias_C = ctx.saved_tensors
        taps_WC = weight_CW.T.float().contiguous()
        width, reversed_taps_WC = len(taps_WC), taps_WC.flip(0)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dtaps_WC, dbias_C = torch.zeros_like(taps_WC), taps_WC.new_zeros(len(weight_CW))
        for of_document in ctx.chunks:
            later = taps_WC.new_zeros(width - 1, len(weight_CW))  # nothing comes after the document
            for rows in reversed(of_document):
                window = _window(x, rows, of_document[0].start, width)
                dsum = torch.ops.aten.silu_backward(dy[rows].float(), _slide(window, taps_WC, bias_C))
                if ctx.needs_input_grad[1]:
                    dtaps_WC += torch.stack([(tap * dsum).sum(0) for tap in _shifted(window, width)])
                if ctx.needs_input_grad[2]:
                    dbias_C += dsum.sum(0)
                dsum = torch.cat([dsum, later])
                dx[rows] = _slide(dsum, reversed_taps_WC, None)
                later = dsum[: width - 1]
        return dx, dtaps_WC.T.to(weight_CW.dtype), None if bias_C is None else dbias_C.to(bias_C.dtype), None


def _window(x_TC: Tensor, rows: slice, start: int, width: int) -> Tensor:
    """These rows of a document that begins at `start`, and the `width - 1` before them, zeros where there are none; fp32."""
    first = max(start, rows.start - width + 1)
    return F.pad(x_TC[first : rows.stop].float(), (0, 0, width - 1 - (rows.start - first), 0))


def _shifted(window: Tensor, width: int) -> list[Tensor]:
    """What each tap sees."""
    return [window[i : len(window) - (width - 1) + i] for i in range(width)]


def _slide(window: Tensor, taps_WC: Tensor, bias_C: Tensor | None) -> Tensor:
    """`bias + sum_i taps[i] window[t + i]`."""
    first, *others = _shifted(window, len(taps_WC))
    total = first * taps_WC[0] if bias_C is None else torch.addcmul(bias_C.float(), first, taps_WC[0])
    for tap, weight_C in zip(others, taps_WC[1:], strict=True):
        total.addcmul_(tap, weight_C)
    return total


def causal_conv1d_ref(x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, documents: Documents) -> Tensor:
    """`causal_conv1d` as the definition reads: PyTorch's convolution, document by document."""
    width = weight_CW.shape[1]
    rows = []
    for x_LC in x_TC.split(documents.lengths):
        padded_1CL = F.pad(x_LC.T, (width - 1, 0)).unsqueeze(0)
        rows.append(F.conv1d(padded_1CL, weight_CW.unsqueeze(1), bias_C, groups=weight_CW.shape[0])[0].T)
    return F.silu(torch.cat(rows))


def conv_state(x_TC: Tensor, width: int, documents: Documents) -> Tensor:
    """The last `width - 1` inputs of each document, zeros before its beginning: [docs, width - 1, C]."""
    return torch.stack([F.pad(x_LC, (0, 0, width - 1, 0))[-(width - 1) :] for x_LC in x_TC.split(documents.lengths)])


def causal_conv1d_step(x_BC: Tensor, state_BWC: Tensor, weight_CW: Tensor, bias_C: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token per sequence. `state` [B, width - 1, C] holds the inputs before it; returns the output [B, C] and the next state."""
    window_BWC = torch.cat([state_BWC, x_BC.unsqueeze(1)], dim=1)
    y_BC = (window_BWC.float() * weight_CW.float().T).sum(1)
    if bias_C is not None:
        y_BC = y_BC + bias_C.float()
    return F.silu(y_BC).to(x_BC.dtype), window_BWC[:, 1:]
