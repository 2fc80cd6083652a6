"""Which experts the router chooses on the held-out rows, and how far that has moved from the base.

A layer's load is each expert's share of all choices (token x top-k), so it sums to 1 and an even one is 1 / experts. Drift is the
total variation distance between two loads: the share of choices that went to other experts, 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from nemotune.models import CausalLM
from nemotune.models.nemotron_h import Router
from nemotune.ops.experts import Routing

Counts = dict[str, list[int]]  # layer -> choices of each expert


class ExpertCounter:
    """Counts choices in the forward passes within `counting`, on the device and without a wait; outside of it nothing is hooked."""

    def __init__(self, model: CausalLM):
        self.routers = routers(model)
        self._counts: dict[str, Tensor] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count anew until the end of the block."""
        with ExitStack() as stack:
            for layer, router in self.routers.items():
                counts_E = torch.zeros(router.config.n_routed_experts, dtype=torch.int64, device=router.weight.device)
                self._counts[layer] = counts_E
                hook = router.register_forward_hook(lambda _module, _inputs, routing, counts_E=counts_E: _add(counts_E, routing))
                stack.callback(hook.remove)
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count until the end of the block."""
        held = {layer: counts_E.clone() for layer, counts_E in self._counts.items()}
        yield
        for layer, counts_E in held.items():
            self._counts[layer].copy_(counts_E)

    def counts(self) -> Counts:
        """What was counted, by layer; the one place that waits for the device."""
        if not self._counts:
            return {}
        return dict(zip(self._counts, torch.stack(list(self._counts.values())).tolist(), strict=True))


def routers(model: CausalLM) -> dict[str, Router]:
    """Those that this process holds, by layer."""
    return {str(index): module for index, block in enumerate(model.blocks) for module in block.modules() if isinstance(module, Router)}


def _add(counts_E: Tensor, routing: Routing) -> None:
    chosen = routing.experts_TK.flatten()
    counts_E.scatter_add_(0, chosen, torch.ones_like(chosen))  # bincount would wait for the device


def load_row(counts: Mapping[str, Sequence[int]], base: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The row of metrics.jsonl: the largest drift, and for each layer its busiest and idlest share, its drift and the counts."""
    layers: dict[str, dict[str, Any]] = {}
    for layer, chosen in counts.items():
        share, before = _shares(chosen), _shares(base[layer])
        drift = sum(abs(now - then) for now, then in zip(share, before, strict=True)) / 2
        layers[layer] = {"busiest": round(max(share), 6), "idlest": round(min(share), 6), "drift": round(drift, 6), "counts": list(chosen)}
    return {"drift": max(layer["drift"] for layer in layers.values()), "layers": layers}


def describe_load(row: Mapping[str, Any]) -> str:
    """A row in one line: the busiest and the idlest expert and the largest drift, each with its layer."""
    layers = row["layers"]
    busiest = max(layers, key=lambda layer: layers[layer]["busiest"])
    idlest = min(layers, key=lambda layer: layers[layer]["idlest"])
    drifted = max(layers, key=lambda layer: layers[layer]["drift"])
    return (
        f"experts at step {row['step']}: the busiest has {layers[busiest]['busiest']:.1%} of the choices (layer {busiest}), the idlest "
        f"{layers[idlest]['idlest']:.1%} (layer {idlest}); drift against the base up to {layers[drifted]['drift']:.3f} (layer {drifted})"
    )


def _shares(counts: Sequence[int]) -> list[float]:
    total = max(sum(counts), 1)
    return [count / total for count in counts]
