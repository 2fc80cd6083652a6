"""Keeps the experts of a model whose routers are trained evenly used: a correction bias that moves, and a loss.

After each step the bias of expert e moves by `rate * sign(mean load - load of e)`, its load being the tokens of the global batch that chose it
(arXiv 2408.15664; Megatron-core's `moe_router_bias_update_rate`). The loss is that of `ops/balance.py`, each token counting once:
`coef * sum_d T_d / T sum_e ...` for each layer, T the tokens of the global batch. Neither knows how the batch was cut or packed.

Loads are counted within `counting` alone, not where a block is computed again in the backward. Documents with the number -1 are no data,
and count nowhere. In a run of several processes `total` sums over those that saw other tokens or hold other layers; a process must hold whole
documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from nemotune.data.loader import FILLER
from nemotune.errors import RecipeError
from nemotune.models import CausalLM
from nemotune.models.nemotron_h import Router
from nemotune.ops.balance import attach_loss, balance_loss
from nemotune.ops.documents import Documents
from nemotune.ops.experts import Routing
from nemotune.recipe import Train
from nemotune.train.experts import routers


def identity(summed: Tensor) -> Tensor:
    """One process saw everything."""
    return summed


class Balance:
    """Watches the routers of `model`; its hooks do nothing before the first micro batch."""

    def __init__(self, model: CausalLM, *, rate: float, coef: float, total: Callable[[Tensor], Tensor] = identity):
        self.rate, self.coef, self.total = rate, coef, total
        layers, here = model.config.expert_layers, routers(model)
        self.routers = {place: here[str(layer)] for place, layer in enumerate(layers) if str(layer) in here}
        self._counts_LE = torch.zeros(len(layers), model.config.n_routed_experts, dtype=torch.int64, device=model.device)
        self._loss = torch.zeros((), device=model.device)
        self._tokens = 0.0
        self._documents: Documents | None = None  # of the micro batch whose forward or backward runs
        self._is_forward = False
        for layer, router in self.routers.items():
            router.register_forward_hook(lambda router, _, routing, layer=layer: self._after(layer, router, routing))

    @classmethod
    def of(cls, model: CausalLM, train: Train, *, total: Callable[[Tensor], Tensor] = identity) -> Balance | None:
        """What the recipe asks for; None where it asks for neither. Raises RecipeError for a model without experts."""
        require_experts(model, train)
        rate, coef = train.router_bias_update_rate, train.router_aux_loss_coef
        return cls(model, rate=rate, coef=coef, total=total) if rate or coef else None

    def begin(self, tokens: int) -> None:
        """Before a step over a global batch of so many tokens."""
        self._tokens = float(tokens)

    def turn_to(self, documents: Documents, document_ids: Tensor) -> None:
        """Before the forward of a micro batch, and before its backward where another one's forward has come between."""
        self._documents = documents
        self._counted_D = (document_ids != FILLER).to(documents.cu_seqlens.device, non_blocking=True)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around the forward of a micro batch."""
        self._is_forward = True
        yield
        self._is_forward = False

    @torch.no_grad()
    def step(self) -> dict[str, Tensor]:
        """After the update: move the biases and count anew. Returns the loss, mean of the layers and 1 where even, and the worst load.

        `expert_max_violation` is by how much the busiest expert of any layer exceeds its layer's mean, as a share of that (section 3 there).
        """
        counts_LE = self.total(self._counts_LE)
        num_experts = counts_LE.shape[1]
        sums_L1 = counts_LE.sum(-1, keepdim=True)
        directions_LE = (sums_L1 - counts_LE * num_experts).sign()
        for layer, router in self.routers.items():
            router.e_score_correction_bias.add_(directions_LE[layer], alpha=self.rate)
        measured = {"expert_max_violation": (counts_LE * num_experts / sums_L1).max() - 1}
        if self.coef:
            measured["router_aux_loss"] = self.total(self._loss) / len(counts_LE)
        self._counts_LE, self._loss = torch.zeros_like(counts_LE), torch.zeros_like(self._loss)
        return measured

    def _after(self, layer: int, router: Router, routing: Routing) -> Routing:
        if self._documents is None or not torch.is_grad_enabled():
            return routing
        if self._is_forward:
            counted_TK = self._counted_D[self._documents.indices_T].long()[:, None].expand_as(routing.experts_TK)
            self._counts_LE[layer].scatter_add_(0, routing.experts_TK.flatten(), counted_TK.flatten())
        if not self.coef:
            return routing
        assert routing.scores_TE is not None
        loss = balance_loss(routing.scores_TE, self._documents, self._counted_D, top_k=router.config.num_experts_per_tok) / self._tokens
        if self._is_forward:
            self._loss += loss.detach()
        return replace(routing, weights_TK=attach_loss(routing.weights_TK, self.coef * loss))


def require_experts(model: CausalLM, train: Train) -> None:
    """Raises RecipeError where routers are to be balanced and the model has none."""
    asked = {"train.router_bias_update_rate": train.router_bias_update_rate, "train.router_aux_loss_coef": train.router_aux_loss_coef}
    problems = [f"{key}: got {got:g}, expected 0: this {model.family} has no experts" for key, got in asked.items() if got]
    if problems and not model.config.expert_layers:
        raise RecipeError("\n".join(problems))
