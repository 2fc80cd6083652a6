"""The balance loss of a router, sequence by sequence (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20), and how it joins a forward pass.

A sequence is a document: no packing shows in it. Megatron-core calls it `seq_aux_loss`, and its sequence is a whole row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemotune.ops.documents import Documents


def balance_loss(scores_TE: Tensor, documents: Documents, counted_D: Tensor, *, top_k: int) -> Tensor:
    """`sum_d T_d E sum_e f_de P_de` over the documents that are `counted_D`: T_d tokens, even loads give T_d.

    `f_de` is the share of the T_d K choices by score that fall on expert e (without the correction bias, which would hide what it mends),
    a constant in the backward; `P_de` is the mean of its scores, where each token's sum to 1.
    """
    num_experts = scores_TE.shape[1]
    with torch.no_grad():
        chosen_TK = scores_TE.topk(top_k, sorted=False).indices
        places_TK = documents.indices_T[:, None] * num_experts + chosen_TK
        counts_DE = scores_TE.new_zeros(len(documents.lengths), num_experts)
        counts_DE.view(-1).scatter_add_(0, places_TK.flatten(), torch.ones_like(places_TK, dtype=counts_DE.dtype).flatten())
        shares_DE = counts_DE / (top_k * documents.cu_seqlens.diff()[:, None]) * counted_D[:, None]
    probabilities_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
    return num_experts * (probabilities_TE * shares_DE[documents.indices_T]).sum()


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """`x`, whose backward is that of `loss` too: so a loss of one layer needs no way to the end of the model."""
    return _Attach.apply(x, loss)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad.new_ones(())
