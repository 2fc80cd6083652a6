"""One optimiser step over a global batch, and the validation loss.

The loss is the sum over supervised tokens divided by their number in the GLOBAL batch, so it does not depend on how the batch is
cut into micro batches. Gradients accumulate, and are clipped, in fp32: every trainable parameter is fp32.

Where documents end and which positions are supervised is found on the CPU, and losses are summed on the device, which is waited for once
a step: it computes one micro batch while Python prepares the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from nemotune.data.loader import Batch
from nemotune.lora import DropoutKeys
from nemotune.models import CausalLM
from nemotune.ops.documents import Documents
from nemotune.train.balance import Balance
from nemotune.train.optim import set_learning_rate


@dataclass(frozen=True)
class StepResult:
    """What one global batch measured: mean loss per supervised token, tokens seen."""

    loss: float
    tokens: int
    supervised_tokens: int


def accumulate(
    model: CausalLM, batches: Sequence[Batch], *, keys: DropoutKeys | None, seed: int, step: int, balance: Balance | None = None
) -> StepResult:
    """Add the gradients of the global batch's mean loss to the parameters, and of what `balance` adds to it."""
    if balance is not None:
        balance.begin(batches)
    supervised = sum(batch.num_supervised for batch in batches)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch in batches:
        documents = Documents(batch.cu_seqlens, model.device)
        if keys is not None:
            ids = batch.document_ids.to(model.device, non_blocking=True)
            keys.set(seed=seed, step=step, documents_T=ids[documents.indices_T], positions_T=documents.positions_T)
        with balance.forward(documents, batch.document_ids) if balance else nullcontext():
            hidden_TD = model(batch.tokens_T.to(model.device, non_blocking=True), documents)
        loss = model.loss(hidden_TD, batch.targets_T) / supervised
        loss.backward()
        total += loss.detach()
    return StepResult(total.item(), sum(batch.num_tokens for batch in batches), supervised)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The L2 norm of all gradients together, fp32."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()


def update(
    parameters: Iterable[nn.Parameter], optimizer: Optimizer, *, learning_rate: float, grad_norm: float, max_grad_norm: float
) -> None:
    """Clip, step and clear the gradients; `max_grad_norm` 0 clips nothing."""
    if max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, torch.tensor(grad_norm))
    set_learning_rate(optimizer, learning_rate)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def validation_loss(model: CausalLM, batches: Iterable[Batch]) -> float:
    """Mean loss per supervised token over all batches, dropout off."""
    was_training = model.training
    model.eval()
    total, supervised = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for batch in batches:
        hidden_TD = model(batch.tokens_T.to(model.device, non_blocking=True), batch.cu_seqlens)
        total += model.loss(hidden_TD, batch.targets_T)
        supervised += batch.num_supervised
    model.train(was_training)
    return total.item() / max(supervised, 1)
