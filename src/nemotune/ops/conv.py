"""The short causal depthwise convolution of Mamba, over a packed row: a document never sees the one before it."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotune.ops.documents import Documents
from nemotune.ops.recompute import recomputed


def causal_conv1d(x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, documents: Documents) -> Tensor:
    """`y[t] = silu(bias + sum_j weight[W - 1 - j] x[t - j])`, x being zero before its document begins. Returns [T, C].

    One convolution over the row with W - 1 zeros put before each document.
    """
    inputs = (x_TC, weight_CW) if bias_C is None else (x_TC, weight_CW, bias_C)
    return recomputed(partial(_spaced_conv1d, documents=documents), *inputs)


def _spaced_conv1d(x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor | None = None, *, documents: Documents) -> Tensor:
    gap = weight_CW.shape[1] - 1
    slots_T = torch.arange(x_TC.shape[0], device=x_TC.device) + (documents.indices_T + 1) * gap
    spaced = x_TC.new_zeros(x_TC.shape[0] + len(documents.lengths) * gap, x_TC.shape[1]).index_copy(0, slots_T, x_TC)
    bias_C = None if bias_C is None else bias_C.to(x_TC.dtype)
    y_CT = F.conv1d(spaced.T.unsqueeze(0), weight_CW.to(x_TC.dtype).unsqueeze(1), bias_C, groups=x_TC.shape[1])[0]
    return F.silu(y_CT.T.index_select(0, slots_T - gap))


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
