"""One optimiser step over a global batch, and the validation loss.

The loss is the sum over supervised tokens divided by their number in the GLOBAL batch, so it does not depend on how the batch is
cut into micro batches. Gradients accumulate, and are clipped, in fp32: every trainable parameter is fp32.

Where documents end and which positions are supervised is found on the CPU, and losses are summed on the device, which is waited for once
a step: it computes one micro batch while Python prepares the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nemotune.data.loader import Batch
from nemotune.distributed import World
from nemotune.distributed.gradients import local
from nemotune.distributed.pipeline import Stage
from nemotune.distributed.rows import Row, row_of
from nemotune.distributed.world import ALONE, BATCHES, TOKENS
from nemotune.lora import DropoutKeys
from nemotune.models import CausalLM
from nemotune.train.balance import Balance
from nemotune.train.optim import set_learning_rate


@dataclass(frozen=True)
class StepResult:
    """What one global batch measured: mean loss per supervised token, tokens seen."""

    loss: float
    tokens: int
    supervised_tokens: int


def accumulate(
    model: CausalLM,
    batches: Sequence[Batch],
    *,
    keys: DropoutKeys | None,
    seed: int,
    step: int,
    balance: Balance | None = None,
    world: World = ALONE,
) -> StepResult:
    """Add the gradients of the global batch's mean loss to the parameters, and of what `balance` adds to it.

    `batches` are this process's share of the global batch, as many as any other's; gradients are still its own.
    """
    tokens, supervised = _counted(batches, world)
    if balance is not None:
        balance.begin(tokens)
    stage, total = Stage(model, world), torch.zeros((), dtype=torch.float64, device=model.device)

    def turn_to(row: Row) -> None:
        if keys is not None:
            of_tokens_T = row.document_ids[row.documents.indices_T]
            keys.set(seed=seed, step=step, documents_T=of_tokens_T, positions_T=row.documents.positions_T)
        if balance is not None:
            balance.turn_to(row.documents, row.document_ids)

    def forward(row: Row, x: Tensor) -> Tensor:
        with balance.counting() if balance else nullcontext():
            if not stage.is_last:
                return model(x, row.documents)
            loss = model.row_loss(x, row.documents, row.targets_T) / supervised
        total.add_(loss.detach())
        return loss

    stage.train((row_of(batch, model.device, world) for batch in batches), forward, turn_to=turn_to)
    return StepResult(world.sum(total, "pipeline", *TOKENS).item(), tokens, supervised)


def _counted(batches: Sequence[Batch], world: World) -> tuple[int, int]:
    """Tokens and supervised tokens of the global batch."""
    tokens, supervised = _sum_of_rows(
        sum(batch.num_tokens for batch in batches if not batch.is_filler), sum(batch.num_supervised for batch in batches), world=world
    )
    return tokens, supervised


def _sum_of_rows(*counts: int, world: World) -> list[int]:
    """The counts of all rows, wherever they are."""
    return list(counts) if world.size == 1 else world.sum(torch.tensor(counts, device=world.device), *BATCHES).tolist()


def update(
    parameters: Iterable[nn.Parameter], optimizer: Optimizer, *, learning_rate: float, grad_norm: float, max_grad_norm: float
) -> None:
    """Clip, step and clear the gradients; `max_grad_norm` 0 clips nothing. `grad_norm` is that of all processes' gradients together."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if max_grad_norm and gradients:
        torch._foreach_mul_(gradients, min(1.0, max_grad_norm / (grad_norm + 1e-6)))
    set_learning_rate(optimizer, learning_rate)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def validation_loss(model: CausalLM, batches: Iterable[Batch], *, world: World = ALONE) -> float:
    """Mean loss per supervised token over all batches, dropout off; `batches` are this process's share, as many as any other's."""
    was_training = model.training
    model.eval()
    stage, total, supervised = Stage(model, world), torch.zeros((), dtype=torch.float64, device=model.device), 0

    def rows() -> Iterator[Row]:
        nonlocal supervised
        for batch in batches:
            supervised += batch.num_supervised
            yield row_of(batch, model.device, world)

    def forward(row: Row, x: Tensor) -> Tensor:
        return total.add_(model.row_loss(x, row.documents, row.targets_T)) if stage.is_last else model(x, row.documents)

    stage.evaluate(rows(), forward)
    model.train(was_training)
    loss = world.sum(total, "pipeline", *TOKENS).item()
    return loss / max(1, _sum_of_rows(supervised, world=world)[0])
