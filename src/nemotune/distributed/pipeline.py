"""Micro batches through the stages of a model: each forward as early, each backward as soon as may be (1F1B, arXiv 2006.09503).

A stage is some dozen lines over send and receive here, not `torch.distributed.pipelining`: its stages want all micro batches of a step in one shape
and hold buffers for each of them (those here differ in length, and as many are in flight as there are stages to come), infer shapes by a forward
and a backward of their own, refuse fewer micro batches than stages, and pass on nothing but tensors cut along dim 0, which documents are not.

One process is a pipeline of one stage: forward, backward, forward, backward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemotune.distributed.rows import Row
from nemotune.distributed.shard import divide_again
from nemotune.distributed.world import World
from nemotune.models import CausalLM

# a row, and its tokens or hidden states [T, D] -> hidden states for the next stage, or in the last one the loss
Forward = Callable[[Row, Tensor], Tensor]


class Stage:
    """What this process holds of the model's layers; `before` and `after` are the stages that hold those before and after them."""

    def __init__(self, model: CausalLM, world: World):
        ranks, at = world.ranks("pipeline"), world.index("pipeline")
        group = world.group("pipeline") if len(ranks) > 1 else None
        self.before = Link(ranks[at - 1] if at else None, group)
        self.after = Link(ranks[at + 1] if at + 1 < len(ranks) else None, group)
        self.later = len(ranks) - 1 - at
        self.width, self.dtype, self.model = model.config.hidden_size, model.compute_dtype, model

    @property
    def is_last(self) -> bool:
        return self.later == 0

    def train(self, rows: Iterable[Row], forward: Forward, *, turn_to: Callable[[Row], None]) -> None:
        """Add the gradients of all `rows` to the parameters; forwards and backwards come in the order of the rows.

        `turn_to(row)` is called before its forward, and again before its backward where other rows' forwards have come between.
        """
        flying: deque[Flight] = deque()
        upcoming = iter(rows)
        row = next(upcoming, None)
        x = self.before.swap(None, self._room_for(row))
        while row is not None:
            turn_to(row)
            flying.append(Flight.of(row, x, forward))
            row = next(upcoming, None)  # the device computes meanwhile
            if len(flying) <= self.later:
                self.after.swap(flying[-1].sent, None)
                x = self.before.swap(None, self._room_for(row))
            else:
                gradient = self.after.swap(flying[-1].sent, flying[0].room_for_gradient)
                if self.later:
                    turn_to(flying[0].row)
                x = self.before.swap(flying.popleft().backward(gradient), self._room_for(row))
        while flying:
            gradient = self.after.swap(None, flying[0].room_for_gradient)
            turn_to(flying[0].row)
            self.before.swap(flying.popleft().backward(gradient), None)

    def evaluate(self, rows: Iterable[Row], forward: Forward) -> None:
        """The forwards alone."""
        for row in rows:
            self.after.swap(forward(row, self.before.swap(None, self._room_for(row))), None)
        divide_again(self.model)

    def _room_for(self, row: Row | None) -> Tensor | None:
        """What comes in for `row`: its tokens in the first stage, else hidden states that are received in it."""
        if row is None:
            return None
        if self.before.rank is None:
            return row.tokens_T
        return torch.empty(row.tokens_T.shape[0], self.width, dtype=self.dtype, device=row.tokens_T.device)


@dataclass(frozen=True)
class Link:
    """A stage next to this one; none (`rank` None) at an end of the model."""

    rank: int | None
    group: dist.ProcessGroup | None

    def swap(self, sent: Tensor | None, room: Tensor | None) -> Tensor | None:
        """Send the one and receive the other in `room`, at once: of neighbours that both send first, each would wait for the other."""
        if self.rank is not None:
            wanted = [(dist.isend, sent), (dist.irecv, room)]
            operations = [dist.P2POp(kind, tensor, self.rank, self.group) for kind, tensor in wanted if tensor is not None]
            for work in dist.batch_isend_irecv(operations) if operations else []:
                work.wait()
        return room


@dataclass(frozen=True)
class Flight:
    """A row between its forward and its backward: what came in, and what went out."""

    row: Row
    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, row: Row, x: Tensor, forward: Forward) -> Flight:
        if x.is_floating_point():
            x.requires_grad_()
        return cls(row, x, forward(row, x))

    @property
    def sent(self) -> Tensor:
        return self.y.detach()

    @property
    def room_for_gradient(self) -> Tensor | None:
        return torch.empty_like(self.y) if self.y.ndim else None  # a loss has none

    def backward(self, gradient: Tensor | None) -> Tensor | None:
        """The gradient of what came in. Nothing is to be done in a first stage that trains nothing."""
        if self.y.requires_grad:
            self.y.backward(gradient)
        return self.x.grad
