"""What stops a run that would only waste time: adapters whose gradient is dead, values that are not finite, a loss that runs away."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from statistics import median

import torch
from torch import Tensor, nn

from nemotune.errors import TrainingError
from nemotune.lora import LoRAEmbedding, LoRAExperts, lora_modules
from nemotune.lora.layers import LoRALayer

EXPERT_STEPS = 10  # steps over which each expert's gradient is watched
SPIKE_FACTOR, SPIKE_MARGIN, SPIKE_WINDOW, SPIKES_TO_STOP = 2.0, 1.0, 32, 5


class Liveness:
    """Sees that every adapter tensor has a gradient: the one that begins at zero from the first backward, the other as soon as that one is not.

    lora_B begins at zero, of embeddings their A; DoRA's magnitudes have a gradient from the first backward too.
    Of experts, each one that received gradient for an input that is not zero must pass it on, which is judged over EXPERT_STEPS steps,
    or those of a shorter run; those that received none are listed.
    """

    def __init__(self, model: nn.Module):
        self.layers = dict(lora_modules(model))
        self.received: dict[tuple[str, str], Tensor] = {}  # (module, lora_A or lora_B) -> per expert: was it to get a gradient?
        self.alive: dict[tuple[str, str], Tensor] = {}  # ... and has it had one?
        self.steps = 0
        experts = {name: layer for name, layer in self.layers.items() if isinstance(layer, LoRAExperts)}
        self._hooks = [layer.register_forward_hook(self._watch(name)) for name, layer in experts.items()]

    def check(self) -> None:
        """Call after each backward and before the update. Raises TrainingError naming the module."""
        if self.steps >= EXPERT_STEPS:
            return
        dead = [problem for name, layer in self.layers.items() if not isinstance(layer, LoRAExperts) for problem in self._dead(name, layer)]
        if dead:
            raise TrainingError(
                f"{len(dead)} adapter tensors have no gradient, first {dead[0]}; the module's weight is used without calling the module, "
                "or no token reaches it"
            )
        for name, layer in self.layers.items():
            if isinstance(layer, LoRAExperts):
                for which, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                    if parameter.grad is not None:
                        _mark(self.alive, (name, which), _any_per_expert(parameter.grad))
        self.steps += 1
        if self.steps == EXPERT_STEPS:
            self.judge()

    def judge(self) -> None:
        """End the watch over experts; call it when a run ends, which may be before EXPERT_STEPS. Raises TrainingError naming the module."""
        for hook in self._hooks:
            hook.remove()
        silent = [name for name, layer in self.layers.items() if isinstance(layer, LoRAExperts) and (name, "lora_B") not in self.received]
        if silent:
            raise TrainingError(
                f"{silent[0]}: no gradient reached this module in {self.steps} steps ({len(silent)} in all); its weight is used without calling it"
            )
        for (name, which), received in self.received.items():
            dead = received & ~self.alive.get((name, which), torch.zeros_like(received))
            if dead.any():
                experts = (self.layers[name].first_expert + dead.nonzero()).flatten().tolist()[:8]
                raise TrainingError(f"{name}: experts {experts} received gradient and their {which} has none after {self.steps} steps")

    def reached(self) -> dict[str, dict[int, bool]]:
        """Whether a gradient reached each expert that is here while it was watched, by module and by the expert's number in its layer."""
        return {
            name: dict(enumerate(seen.tolist(), self.layers[name].first_expert))
            for (name, which), seen in self.received.items()
            if which == "lora_B"
        }

    def _dead(self, name: str, layer: LoRALayer) -> list[str]:
        checked = dict(layer.named_parameters(recurse=False))
        if isinstance(layer, LoRAEmbedding):
            if not _saw_moved_tokens(layer):
                del checked["lora_embedding_B"]
        elif not layer.lora_B.any():
            del checked["lora_A"]
        return [f"{name}.{which}" for which, parameter in checked.items() if parameter.grad is None or not parameter.grad.any()]

    def _watch(self, name: str) -> Callable[[LoRAExperts, tuple, Tensor], None]:
        def after_forward(layer: LoRAExperts, inputs: tuple, output: Tensor) -> None:
            if not output.requires_grad:
                return
            experts_M, has_input_M = inputs[1].experts_M, inputs[0].detach().any(-1)

            def after_backward(gradient: Tensor) -> None:
                rows_E = torch.zeros(layer.base.num_experts, dtype=torch.int32, device=output.device)
                reached = rows_E.index_add_(0, experts_M, (gradient.any(-1) & has_input_M).int()) > 0
                _mark(self.received, (name, "lora_B"), reached)
                _mark(self.received, (name, "lora_A"), reached & _any_per_expert(layer.lora_B))

            output.register_hook(after_backward)

        return after_forward


def unreached_experts(of_processes: Iterable[Mapping[str, Mapping[int, bool]]]) -> dict[str, int]:
    """Experts that no gradient reached in any process while watched, counted by module: they keep the base's behaviour."""
    reached: dict[str, dict[int, bool]] = {}
    for by_module in of_processes:
        for name, by_expert in by_module.items():
            known = reached.setdefault(name, {})
            known.update({expert: is_reached or known.get(expert, False) for expert, is_reached in by_expert.items()})
    unreached = {name: sum(not is_reached for is_reached in by_expert.values()) for name, by_expert in reached.items()}
    return {name: count for name, count in unreached.items() if count}


def _saw_moved_tokens(layer: LoRAEmbedding) -> bool:
    """Whether a gradient came to a token whose column of A is not zero."""
    A_RV = layer.lora_embedding_A
    return A_RV.grad is not None and bool((A_RV.grad.any(0) & A_RV.any(0)).any())


def _any_per_expert(values: Tensor) -> Tensor:
    return values.flatten(1).any(1)


def _mark(seen: dict[tuple[str, str], Tensor], key: tuple[str, str], new: Tensor) -> None:
    seen[key] = seen[key] | new if key in seen else new


def require_finite(loss: float, grad_norm: float, parameters: dict[str, nn.Parameter], *, step: int) -> None:
    """Raise TrainingError naming the first parameter with a non-finite gradient; call before the update."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    bad = [name for name, p in parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
    where = f"the first non-finite gradient is that of {bad[0]} ({len(bad)} in all)" if bad else "all gradients are finite"
    raise TrainingError(
        f"step {step}: loss {loss}, gradient norm {grad_norm}; {where}. Nothing was updated. Lower train.learning_rate, use model.dtype=float32, "
        "or look for near-zero rows of embeddings in the base: nemotune doctor MODEL_DIR"
    )


class SpikeGuard:
    """Notices a loss far above the median of `usual` ones; several `spikes` in a row are divergence. Made anew from both, it goes on."""

    def __init__(self, usual: Iterable[float] = (), spikes: int = 0) -> None:
        self.usual, self.spikes = deque(usual, maxlen=SPIKE_WINDOW), spikes

    def check(self, loss: float, *, step: int) -> str | None:
        """A warning where `loss` spikes, else None. Raises TrainingError when it keeps doing so."""
        usual = median(self.usual) if len(self.usual) == SPIKE_WINDOW else math.inf
        if loss <= SPIKE_FACTOR * usual + SPIKE_MARGIN:
            self.usual.append(loss)
            self.spikes = 0
            return None
        self.spikes += 1
        if self.spikes >= SPIKES_TO_STOP:
            raise TrainingError(
                f"step {step}: the loss has been over {loss:.2f} for {self.spikes} steps where {usual:.2f} was usual; begin again with a lower train.learning_rate or a longer warmup"
            )
        return f"loss {loss:.2f} where {usual:.2f} is usual"
