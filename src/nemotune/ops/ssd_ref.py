"""The selective state space of Mamba-2 as the recurrence reads, one token after the other: the reference for `ssd.py`, and one decoding step.

State space duality, arXiv 2405.21060, equation 1 with scalar A per head:
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t
Heads N share B and C in G groups of N / G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotune.ops.documents import Documents


def ssd_step(
    x_BNP: Tensor, dt_BN: Tensor, A_N: Tensor, B_BGS: Tensor, C_BGS: Tensor, D_N: Tensor, state_BNPS: Tensor
) -> tuple[Tensor, Tensor]:
    """One token per sequence: the output [B, N, P] in the dtype of x, and the next state [B, N, P, S] in fp32."""
    heads_per_group = A_N.shape[0] // B_BGS.shape[1]
    B_BNS = B_BGS.float().repeat_interleave(heads_per_group, dim=1)
    C_BNS = C_BGS.float().repeat_interleave(heads_per_group, dim=1)
    x, dt_BN = x_BNP.float(), dt_BN.float()
    decay_BN = torch.exp(dt_BN * A_N.float())
    state_BNPS = decay_BN[..., None, None] * state_BNPS + torch.einsum("bn,bnp,bns->bnps", dt_BN, x, B_BNS)
    y_BNP = torch.einsum("bnps,bns->bnp", state_BNPS, C_BNS) + D_N.float()[:, None] * x
    return y_BNP.to(x_BNP.dtype), state_BNPS


def ssd_ref(
    x_TNP: Tensor, dt_TN: Tensor, A_N: Tensor, B_TGS: Tensor, C_TGS: Tensor, D_N: Tensor, documents: Documents
) -> tuple[Tensor, Tensor]:
    """The whole row step by step: outputs [T, N, P] and the state at the end of each document [docs, N, P, S]."""
    outputs, states = [], []
    start = 0
    for length in documents.lengths:
        state = x_TNP.new_zeros(1, *x_TNP.shape[1:], B_TGS.shape[-1], dtype=torch.float32)
        for t in range(start, start + length):
            y, state = ssd_step(x_TNP[t : t + 1], dt_TN[t : t + 1], A_N, B_TGS[t : t + 1], C_TGS[t : t + 1], D_N, state)
            outputs.append(y)
        states.append(state)
        start += length
    return torch.cat(outputs), torch.cat(states)
