"""Mixture of experts: the router's choice, tokens sorted by expert, and the sum of what their experts give; the products are `grouped.py`.

Router: sigmoid scores, a correction bias that only chooses, group-limited top-k (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Each token's experts [T, top_k], rising, and their weights, fp32; the scores of all experts, which a loss may want."""

    experts_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor | None = None


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
    experts_TK = choice_TE.topk(top_k, dim=-1, sorted=False).indices.sort(-1).values
    weights_TK = scores_TE.gather(1, experts_TK)
    if normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return Routing(experts_TK, weights_TK * scale, scores_TE)


@dataclass(frozen=True)
class Dispatch:
    """T * top_k rows sorted by expert, and where each token finds its own. Tensors only: nothing here waits for a device."""

    tokens_M: Tensor  # the token of each sorted row
    experts_M: Tensor  # its expert, rising
    ends_E: Tensor  # int32: where each expert's rows end, as grouped products want it
    rows_TK: Tensor  # the sorted rows of each token, in the order of its experts
    weights_TK: Tensor  # fp32

    def sorted_rows(self, x_TD: Tensor) -> Tensor:
        """Each token's row once per expert that it goes to, sorted by expert: [M, D]."""
        return _Spread.apply(x_TD, self.tokens_M, self.rows_TK)

    def of_tokens(self, values_T: Tensor) -> Tensor:
        """For each sorted row its token's value; without a gradient."""
        return values_T[self.tokens_M]

    def combine(self, y_MD: Tensor) -> Tensor:
        """Weigh the experts' outputs and add them up per token: [T, D] in the dtype of y.

        The sum is fp32, over a token's experts in the order of `rows_TK` (rising, as `route` gives them): the same bits every time.
        """
        return _Combine.apply(y_MD, self.weights_TK, self.rows_TK)


def dispatch(routing: Routing, num_experts: int) -> Dispatch:
    """The sorted order for a grouped matrix product; M = T * top_k."""
    flat_M = routing.experts_TK.flatten()
    experts_M, order_M = flat_M.sort(stable=True)
    rows_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
    return Dispatch(
        tokens_M=order_M // routing.experts_TK.shape[1],
        experts_M=experts_M,
        ends_E=torch.searchsorted(experts_M, torch.arange(num_experts, device=flat_M.device), right=True, out_int32=True),
        rows_TK=rows_M.view_as(routing.experts_TK),
        weights_TK=routing.weights_TK,
    )


class _Spread(torch.autograd.Function):
    """Rows by index; the gradient gathers them back, where indexing's own would add with atomics."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, tokens_M: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_TK)
        return x_TD.index_select(0, tokens_M)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (rows_TK,) = ctx.saved_tensors
        return _sum_per_token(grad_MD, rows_TK), None, None


class _Combine(torch.autograd.Function):
    """Saves y and the weights as they are, no fp32 copy of y."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, weights_TK: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_MD, weights_TK, rows_TK)
        return _sum_per_token(y_MD, rows_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        y_MD, weights_TK, rows_TK = ctx.saved_tensors
        grad_TD, grad_y_MD, grad_weights_TK = grad_TD.float(), torch.empty_like(y_MD), torch.empty_like(weights_TK)
        for k, rows_T in enumerate(rows_TK.unbind(1)):
            grad_y_MD.index_copy_(0, rows_T, (grad_TD * weights_TK[:, k, None]).to(y_MD.dtype))
            grad_weights_TK[:, k] = (grad_TD * y_MD.index_select(0, rows_T)).sum(-1)
        return grad_y_MD, grad_weights_TK, None


def _sum_per_token(y_MD: Tensor, rows_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """`sum_k weights[t, k] y[rows[t, k]]`, fp32 for one k at a time: [T, D] in the dtype of y."""
    sum_TD = y_MD.new_zeros(rows_TK.shape[0], y_MD.shape[1], dtype=torch.float32)
    for k, rows_T in enumerate(rows_TK.unbind(1)):
        y_TD = y_MD.index_select(0, rows_T)
        sum_TD = sum_TD.add_(y_TD) if weights_TK is None else sum_TD.addcmul_(y_TD, weights_TK[:, k, None])
    return sum_TD.to(y_MD.dtype)


def experts_ref(x_TD: Tensor, up_EFD: Tensor, down_EDF: Tensor, routing: Routing) -> Tensor:
    """relu^2 experts as the definition reads, token by token: the reference for dispatch and grouped.grouped_linear."""
    y_TD = torch.zeros_like(x_TD)
    for t in range(x_TD.shape[0]):
        for e, w in zip(routing.experts_TK[t].tolist(), routing.weights_TK[t], strict=True):
            y_TD[t] += w * (down_EDF[e] @ F.relu(up_EFD[e] @ x_TD[t]).square())
    return y_TD
