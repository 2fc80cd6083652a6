"""The short causal depthwise convolution of Mamba, over a packed row: a document never sees the one before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotune.ops.documents import Documents


def causal_conv1d(x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, documents: Documents) -> Tensor:
    """`y[t] = silu(bias + sum_j weight[W - 1 - j] x[t - j])`, x being zero before its document begins. Returns [T, C].

    fp32 inside: four rounded sums would drift from the kernels, which accumulate in fp32.
    """
    weight_CW = weight_CW.float()
    width = weight_CW.shape[1]
    y_TC = x_TC.float() * weight_CW[:, -1]
    for j in range(1, min(width, x_TC.shape[0])):
        inside_T = (documents.positions_T[j:] >= j).unsqueeze(-1)
        term_TC = (x_TC[:-j] * inside_T).float() * weight_CW[:, width - 1 - j]
        y_TC = y_TC + F.pad(term_TC, (0, 0, j, 0))
    if bias_C is not None:
        y_TC = y_TC + bias_C.float()
    return F.silu(y_TC).to(x_TC.dtype)


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
