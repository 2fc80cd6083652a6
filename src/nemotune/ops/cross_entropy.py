"""The loss at the output head: logits exist only for supervised positions, and only a chunk of them at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100


def linear_cross_entropy(head: Callable[[Tensor], Tensor], hidden_TD: Tensor, targets_T: Tensor, *, chunk_tokens: int = 256) -> Tensor:
    """The sum of -log p(target) over positions whose target is not -100, fp32; zero (with a gradient) where there are none.

    `head` maps [n, D] to logits [n, V]. Each chunk's logits are computed again in the backward pass, so that
    memory is one chunk of logits (131,072 wide for Nemotron 3) and never the row's.
    """
    supervised = (targets_T != IGNORE).nonzero().squeeze(-1)
    if not len(supervised):
        return hidden_TD.sum().float() * 0.0
    chunks = zip(hidden_TD[supervised].split(chunk_tokens), targets_T[supervised].split(chunk_tokens), strict=True)
    return torch.stack([_chunk_loss(head, hidden, targets) for hidden, targets in chunks]).sum()


def _chunk_loss(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    def loss(hidden: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")

    return checkpoint(loss, hidden, use_reentrant=False) if torch.is_grad_enabled() else loss(hidden)
