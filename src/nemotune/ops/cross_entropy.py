"""The loss at the output head: logits exist only for supervised positions, and only a chunk of them at a time."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100


class SoftmaxLoss(Protocol):
    """The summed loss of fp32 logits, which may be overwritten; `with_gradient` they become its gradient `softmax(logits) - onehot(target)`."""

    def __call__(self, logits_NV: Tensor, targets_N: Tensor, *, with_gradient: bool) -> Tensor: ...


def softmax_loss(logits_NV: Tensor, targets_N: Tensor, *, with_gradient: bool) -> Tensor:
    """A SoftmaxLoss over logits of the whole vocabulary."""
    if not with_gradient:
        return F.cross_entropy(logits_NV, targets_N, reduction="sum")
    log_p_NV, targets_N1 = torch.log_softmax(logits_NV, dim=-1, out=logits_NV), targets_N.unsqueeze(-1)
    loss = -log_p_NV.gather(1, targets_N1).sum()
    p_NV = log_p_NV.exp_()
    p_NV.scatter_add_(1, targets_N1, p_NV.new_full(targets_N1.shape, -1))
    return loss


def linear_cross_entropy(
    head: nn.Module, hidden_TD: Tensor, targets_T: Tensor, *, chunk_tokens: int = 256, loss: SoftmaxLoss = softmax_loss
) -> Tensor:
    """The sum of -log p(target) over positions whose target is not -100, fp32; zero (with a gradient) where there are none.

    `head` maps [n, D], and which positions these are [n], to logits [n, V]; those of its parameters that require a gradient get one.
    Each chunk's gradient is taken while its logits are there, so they are computed once and memory is one chunk of them, never the row's.
    Where `head` gives the logits of a part of the vocabulary, `loss` knows of the rest.
    Targets may lie on the CPU: which are supervised is then known without waiting for the device of `hidden_TD`.
    """
    rows_N = (targets_T != IGNORE).nonzero().squeeze(-1)
    targets_N, rows_N = (part.to(hidden_TD.device, non_blocking=True) for part in (targets_T[rows_N], rows_N))
    hidden_ND = hidden_TD[rows_N]
    trained = [p for p in head.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (hidden_TD.requires_grad or trained):
        return _ChunkedLoss.apply(head, loss, chunk_tokens, rows_N, targets_N, hidden_ND, *trained)
    chunks = zip(*(part.split(chunk_tokens) for part in (hidden_ND, rows_N, targets_N)), strict=True)
    losses = [loss(head(hidden, rows).float(), targets, with_gradient=False) for hidden, rows, targets in chunks if len(rows)]
    return torch.stack(losses).sum() if losses else hidden_TD.new_zeros((), dtype=torch.float32)


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward; the backward only scales them.

    One buffer holds each chunk's fp32 logits, then its log-probabilities, then the gradient: blocks of this size, allocated anew, would
    be paged in by the kernel every time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        loss: SoftmaxLoss,
        chunk_tokens: int,
        rows_N: Tensor,
        targets_N: Tensor,
        hidden_ND: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        gradients = [torch.empty_like(hidden_ND), *(torch.zeros_like(p) for p in trained)]
        buffer = None
        for start in range(0, len(targets_N), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            with torch.enable_grad():
                hidden = hidden_ND[chunk].detach().requires_grad_()
                logits = head(hidden, rows_N[chunk])
            if buffer is None:
                buffer = torch.empty_like(logits, dtype=torch.float32)
            values = buffer[: len(logits)].copy_(logits.detach())
            total += loss(values, targets_N[chunk], with_gradient=True)
            gradient = logits.detach().copy_(values)  # the logits have done their part
            gradients[0][chunk], *of_parameters = torch.autograd.grad(logits, [hidden, *trained], gradient)
            for whole, part in zip(gradients[1:], of_parameters, strict=True):
                whole += part
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, None, None, None, *((gradient * scale).to(gradient.dtype) for gradient in ctx.saved_tensors)
