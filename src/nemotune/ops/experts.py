"""Mixture of experts: the router's choice and the grouped matrix product over tokens sorted by expert.

Router: sigmoid scores, a correction bias that only chooses, group-limited top-k (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Each token's experts [T, top_k] and their weights, fp32."""

    experts_TK: Tensor
    weights_TK: Tensor


def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    correction_bias_E: Tensor,
    *,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalize: bool,
    scale: float,
) -> Routing:
    """Choose `top_k` experts by score + bias within the `top_groups` best groups, weigh them by score alone.

    fp32 throughout: the correction bias sits near 2^6 with a spread under 2^-2, which bf16 erases.
    """
    scores_TE = F.linear(x_TD.float(), weight_ED.float()).sigmoid()
    choice_TE = scores_TE + correction_bias_E.float()
    if top_groups < num_groups:
        grouped_TGE = choice_TE.unflatten(1, (num_groups, -1))
        group_scores_TG = grouped_TGE.topk(2, dim=-1).values.sum(-1)
        chosen = group_scores_TG.topk(top_groups, dim=-1).indices
        kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter(1, chosen, True)
        choice_TE = grouped_TGE.masked_fill(~kept_TG.unsqueeze(-1), -torch.inf).flatten(1)
    experts_TK = choice_TE.topk(top_k, dim=-1, sorted=False).indices
    weights_TK = scores_TE.gather(1, experts_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return Routing(experts_TK, weights_TK * scale)


@dataclass(frozen=True)
class Dispatch:
    """Tokens sorted by expert: row m of the sorted order is token `tokens_M[m]`; expert e owns `counts[e]` rows in turn."""

    tokens_M: Tensor
    weights_M: Tensor
    counts: list[int]


def dispatch(routing: Routing, num_experts: int) -> Dispatch:
    """The sorted order for a grouped matrix product; M = T * top_k."""
    flat_M = routing.experts_TK.flatten()
    order_M = flat_M.argsort(stable=True)
    counts = torch.bincount(flat_M, minlength=num_experts).tolist()
    return Dispatch(order_M // routing.experts_TK.shape[1], routing.weights_TK.flatten()[order_M], counts)


def combine(y_MD: Tensor, sent: Dispatch, num_tokens: int) -> Tensor:
    """Weigh the experts' outputs and add them up per token: [T, D] in the dtype of y. The sum is fp32."""
    weighted_MD = y_MD.float() * sent.weights_M.unsqueeze(-1)
    return weighted_MD.new_zeros(num_tokens, y_MD.shape[1]).index_add(0, sent.tokens_M, weighted_MD).to(y_MD.dtype)


def grouped_linear(x_MI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
    """`x @ weight[e].T` for the rows of each expert e; experts without rows cost nothing. [M, O]."""
    if x_MI.is_cuda:
        ends = torch.tensor(counts, device=x_MI.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x_MI, weight_EOI.to(x_MI.dtype).transpose(-1, -2), offs=ends)
    parts = [F.linear(x, weight.to(x.dtype)) for x, weight in zip(x_MI.split(counts), weight_EOI.unbind(0), strict=True) if len(x)]
    return torch.cat(parts) if parts else x_MI.new_zeros(0, weight_EOI.shape[1])


def experts_ref(x_TD: Tensor, up_EFD: Tensor, down_EDF: Tensor, routing: Routing) -> Tensor:
    """relu^2 experts as the definition reads, token by token: the reference for dispatch, grouped_linear and combine."""
    y_TD = torch.zeros_like(x_TD)
    for t in range(x_TD.shape[0]):
        for e, w in zip(routing.experts_TK[t].tolist(), routing.weights_TK[t], strict=True):
            y_TD[t] += w * (down_EDF[e] @ F.relu(up_EFD[e] @ x_TD[t]).square())
    return y_TD
