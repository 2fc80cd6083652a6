"""Expert parallelism (GShard, arXiv 2006.16668): each process holds a range of every layer's experts, whole, and tokens travel.

A process sorts its tokens' rows by expert and sends each to where its expert is, computes what it was sent as one grouped product, and
gets its own rows back, which it weighs and adds up as ever. Every process takes part in every exchange, forward and backward, though
it may have no row. Tensor ranks see the same tokens: each routes its share of them, and the sum at the end of their region is whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemotune.distributed.holding import hold
from nemotune.distributed.world import World
from nemotune.models import CausalLM
from nemotune.models.layers import GroupedLinear
from nemotune.models.nemotron_h import Dispatcher, Experts
from nemotune.ops.experts import Dispatch, Routing, dispatch
from nemotune.weights import Layout


def arrange(model: CausalLM, world: World) -> None:
    """Let each projection of routed experts hold those of this process."""
    index, ranks = world.expert_ranks.index(world.rank), len(world.expert_ranks)
    parts = {}
    for name, module in model.named_modules():
        if isinstance(module, GroupedLinear):
            here = module.num_experts // ranks
            parts[f"{name}.weight"] = Layout.whole(module.weight.shape).along(0, [(index * here, (index + 1) * here)])
    hold(model, parts)


def connect(model: CausalLM, world: World) -> None:
    """Let tokens travel to their experts. Every process calls it at the same time."""
    world.make_groups([world.expert_ranks])
    group = world.group_of(world.expert_ranks)
    tokens = slice(world.index("tensor"), None, world.degree("tensor"))
    for module in model.modules():
        if isinstance(module, Experts):
            module.dispatch = Exchange(module.dispatch.num_experts, group, tokens)


class Exchange(Dispatcher):
    """Sorts those of the row's tokens that are this process's by expert and sends them there; an equal range of experts is in each process."""

    def __init__(self, num_experts: int, group: Any, tokens: slice):
        super().__init__(num_experts)
        self.group, self.tokens = group, tokens

    def forward(self, routing: Routing) -> Travelled:
        own = dispatch(Routing(routing.experts_TK[self.tokens], routing.weights_TK[self.tokens]), self.num_experts)
        counts_PE = own.ends_E.diff(prepend=own.ends_E.new_zeros(1)).view(self.group.size(), -1)  # P processes of the group
        received_PE = torch.empty_like(counts_PE)
        dist.all_to_all_single(received_PE, counts_PE, group=self.group)
        going, coming = torch.stack((counts_PE.sum(1), received_PE.sum(1))).tolist()  # waits for the device
        experts_E = torch.arange(received_PE.shape[1], device=received_PE.device)
        by_sender_M = experts_E.repeat(len(coming)).repeat_interleave(received_PE.flatten(), output_size=sum(coming))
        experts_M, order_M = by_sender_M.sort(stable=True)
        return Travelled(
            tokens_M=own.tokens_M, experts_M=experts_M, ends_E=received_PE.sum(0).cumsum(0, dtype=torch.int32),
            rows_TK=own.rows_TK, weights_TK=own.weights_TK,
            lanes=Lanes(self.group, going, coming), order_M=order_M, tokens=self.tokens, num_tokens=len(routing.experts_TK),
        )  # fmt: skip


@dataclass(frozen=True)
class Lanes:
    """How many rows go from this process to each of the group, and how many come from each."""

    group: Any
    going: list[int]
    coming: list[int]

    def there(self, rows: Tensor) -> Tensor:
        """What is sent to this process for what it sends, both in the order of the group."""
        return self._exchange(rows, self.going, self.coming)

    def back(self, rows: Tensor) -> Tensor:
        """The other way."""
        return self._exchange(rows, self.coming, self.going)

    def _exchange(self, rows: Tensor, going: list[int], coming: list[int]) -> Tensor:
        received = rows.new_empty(sum(coming), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), coming, going, group=self.group)
        return received


@dataclass(frozen=True)
class Travelled(Dispatch):
    """N rows leave, M arrive: `experts_M`, counted from the first one here, and `ends_E` are of those, what else a Dispatch has is of the own."""

    lanes: Lanes
    order_M: Tensor  # sorts what arrived by expert
    tokens: slice  # those of the row that this process routes
    num_tokens: int  # of the row

    def sorted_rows(self, x_TD: Tensor) -> Tensor:
        """The rows of all senders for the experts that are here, sorted by expert: [M, D]."""
        own_ND = super().sorted_rows(x_TD if self.routes_all else x_TD[self.tokens])
        return _Travel.apply(own_ND, self.order_M, self.lanes, False)  # type: ignore[no-any-return]

    def of_tokens(self, values_T: Tensor) -> Tensor:
        """For each of those rows its token's value, from where its token is."""
        return self.lanes.there(super().of_tokens(values_T[self.tokens]))[self.order_M]

    def combine(self, y_MD: Tensor) -> Tensor:
        """The own tokens' rows, weighed and added up where they are: [T, D]. Tokens that another tensor rank routes are zero."""
        y_TD = super().combine(_Travel.apply(y_MD, self.order_M, self.lanes, True))
        if self.routes_all:
            return y_TD
        whole_TD = y_TD.new_zeros(self.num_tokens, y_TD.shape[1])
        whole_TD[self.tokens] = y_TD
        return whole_TD

    @property
    def routes_all(self) -> bool:
        return self.tokens.step == 1


class _Travel(torch.autograd.Function):
    """Rows to their experts, or back to their senders; each way is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order_M: Tensor, lanes: Lanes, is_return: bool) -> Tensor:
        ctx.lanes, ctx.is_return = lanes, is_return
        ctx.save_for_backward(order_M)
        return _travelled(rows, order_M, lanes, is_return)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _travelled(grad, *ctx.saved_tensors, ctx.lanes, not ctx.is_return), None, None, None


def _travelled(rows: Tensor, order_M: Tensor, lanes: Lanes, is_return: bool) -> Tensor:
    """[N, D] sorted by the process of the expert, to [M, D] sorted by expert; or the other way."""
    if is_return:
        return lanes.back(rows.new_empty(rows.shape).index_copy_(0, order_M, rows))
    return lanes.there(rows).index_select(0, order_M)
