"""The modules that both families are built from. Weights may be fp32 masters: each product casts them to its input's dtype."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotune.models.cache import KVState
from nemotune.ops.attention import attention_step, varlen_attention
from nemotune.ops.documents import Documents
from nemotune.ops.experts import Dispatch
from nemotune.ops.grouped import frozen_grouped_linear, grouped_linear
from nemotune.ops.norm import rms_norm
from nemotune.weights.layout import Layout


class Embedding(nn.Embedding):
    """One row per token. Nothing is drawn when it is made: on the meta device that would load PyTorch's compiler, a second and 110 MB."""

    part: Layout | None = None  # of the whole weight, where this process holds no more

    def reset_parameters(self) -> None:
        pass


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input; a cast is free where the dtypes agree."""

    part: Layout | None = None  # of the whole weight, where this process holds no more

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class GroupedLinear(nn.Module):
    """One linear layer per expert, `weight` [E, out, in], over rows sorted by expert."""

    part: Layout | None = None  # of the whole weight, where this process holds no more
    lent: Any = None  # offload.Lent: gives the tensors on the device, one call at a time, where the module's own lie on the host

    def __init__(self, num_experts: int, in_features: int, out_features: int):
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def forward(self, x_MI: Tensor, sent: Dispatch) -> Tensor:
        if self.lent is None:
            return grouped_linear(x_MI, self.weight, sent.ends_E)
        return frozen_grouped_linear(x_MI, sent.ends_E, self.lent_weights)

    def lent_weights(self, rows_M: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
        """As `frozen_grouped_linear` asks for them."""
        (weight_EOI,) = self.lent()
        return weight_EOI.to(rows_M.dtype), ends_E

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.lent.device if self.lent else next(chain(self.parameters(), self.buffers())).device


class RMSNorm(nn.Module):
    """`ops.norm.rms_norm` with a weight."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Elsewhere(nn.Module):
    """Stands for a module that another process computes, under its name, and hands on what it is given. `weight` is held for another module to use."""

    def __init__(self, weight: nn.Parameter | None = None):
        super().__init__()
        self.register_parameter("weight", weight)

    def forward(self, x_TD: Tensor, *others: Any) -> Tensor:
        return x_TD


class AttentionCore(nn.Module):
    """Attention without its projections: over a packed row, or one token per sequence against the cache."""

    def forward(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents, state: KVState | None) -> Tensor:
        if state is None:
            return varlen_attention(q_TNH, k_TKH, v_TKH, documents)
        if state.is_empty:
            state.fill(k_TKH, v_TKH, documents)
            return varlen_attention(q_TNH, k_TKH, v_TKH, documents)
        state.append(k_TKH, v_TKH)
        return attention_step(q_TNH, state.k_BLKH, state.v_BLKH, state.lengths_B)
