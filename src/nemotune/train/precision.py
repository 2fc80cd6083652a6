"""Before step 1: is every number held as promised? What is trained, what stays fp32, the router, the optimiser's moments.

It looks at the very tensors and modules of the run, whatever made them, and lets each router choose for tokens whose scores bf16 would
round. That the other operators compute as they say is tested in tests/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from nemotune.errors import TrainingError
from nemotune.models import CausalLM
from nemotune.models.layers import Elsewhere
from nemotune.models.nemotron_h import Router
from nemotune.models.quantize import quantized_parameters
from nemotune.recipe import Recipe

SHOWN = 8
PROBES, PROBE_LOGIT = 8, 1 + 2**-8  # tokens, and a logit half-way between two numbers of bf16: rounded, its score moves by a thousandth
SCORE_ERROR = 1e-4  # fp32 sums of some thousand terms err by 1e-6


def audit_precision(model: CausalLM, optimizer: Optimizer, recipe: Recipe) -> str:
    """A line that says what is held in which precision. Raises TrainingError naming everything that is not as promised."""
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    problems = [
        *_trained(model),
        *_always_fp32(model),
        *_routers(routers, recipe, model.compute_dtype),
        *_optimizer(model, optimizer, recipe),
    ]
    if problems:
        more = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise TrainingError(
            "precision: before the first step, not as promised:\n  " + "\n  ".join(problems[:SHOWN]) + more
            + "\nload the model with nemotune.models.load_model and leave its dtypes, torch.autocast and the router alone"
        )  # fmt: skip
    return _line(model, routers, recipe)


def _trained(model: CausalLM) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            yield f"{name}: trained in {_named(parameter.dtype)}, expected float32 (small steps would not move it)"


def _always_fp32(model: CausalLM) -> Iterator[str]:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if model.stays_fp32(name) and tensor.dtype != torch.float32:
            yield f"{name}: held in {_named(tensor.dtype)}, expected float32"


@torch.no_grad()
def _routers(routers: dict[str, Router], recipe: Recipe, compute_dtype: torch.dtype) -> Iterator[str]:
    for name, router in routers.items():
        if router.e_score_correction_bias.requires_grad:
            yield f"{name}.e_score_correction_bias: has a gradient, expected frozen"
        if recipe.method == "lora":
            yield from (f"{name}.{which}: trained, expected frozen under LoRA" for which, p in router.named_parameters() if p.requires_grad)
        yield from (f"{name}: {problem}, expected float32" for problem in _narrow_product(router, compute_dtype))


def _narrow_product(router: Router, compute_dtype: torch.dtype) -> Iterator[str]:
    """What tells that the router computes in less than fp32: the dtype of its weights, or their distance from those of an fp64 product."""
    c, weight_ED = router.config, router.weight.double()
    own_TD = weight_ED[:PROBES]  # tokens along an expert's weight each, as long as makes their logit for it PROBE_LOGIT
    squares_T1 = own_TD.square().sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    x_TD = (own_TD * PROBE_LOGIT / squares_T1).to(compute_dtype)
    routing = router(x_TD)
    if routing.weights_TK.dtype != torch.float32:
        yield f"computes in {_named(routing.weights_TK.dtype)}"
        return
    exact_TK = (x_TD.double() @ weight_ED.T).sigmoid().gather(1, routing.experts_TK)
    if c.norm_topk_prob:
        exact_TK /= exact_TK.sum(-1, keepdim=True)
    error = float((routing.weights_TK / (exact_TK * c.routed_scaling_factor) - 1).abs().max())
    if not error <= SCORE_ERROR:
        yield f"scores are {error:.1e} off (as of a product in fewer bits)"


def _optimizer(model: CausalLM, optimizer: Optimizer, recipe: Recipe) -> Iterator[str]:
    asked, name = recipe.train.optimizer, type(optimizer).__name__
    if (type(optimizer) is AdamW) != (asked == "adamw") or (asked == "adamw_8bit" and name != "AdamW8bit"):
        yield f"train.optimizer: the optimiser is {type(optimizer).__module__}.{name}, expected {asked}"
    held = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    for name, parameter in model.named_parameters():
        if held.pop(id(parameter), 0) != int(parameter.requires_grad):
            yield f"{name}: {'not once' if parameter.requires_grad else 'frozen, and'} among the optimiser's parameters"
        if asked == "adamw":
            yield from _wide_moments(name, parameter, optimizer)
    if held:
        yield f"train.optimizer: {len(held)} of the optimiser's tensors are not the model's"


def _wide_moments(name: str, parameter: nn.Parameter, optimizer: Optimizer) -> Iterator[str]:
    """A resumed run has moments before its first step."""
    for which in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state.get(parameter, {}).get(which)
        if moment is not None and moment.dtype != torch.float32:
            yield f"{name}: {which} is held in {_named(moment.dtype)}, expected float32 for train.optimizer: adamw"


def _line(model: CausalLM, routers: dict[str, Router], recipe: Recipe) -> str:
    numbers = Counter[str]()
    for parameter in model.parameters():
        numbers["trained" if parameter.requires_grad else _named(parameter.dtype)] += parameter.numel()
    parts = [f"{numbers.pop('trained', 0):,} trained in fp32"]
    if quantized := quantized_parameters(model):
        numbers["nf4"] = quantized
    parts += [f"{number:,} frozen in {dtype}" for dtype, number in numbers.most_common()]
    held = {name.rpartition(".")[2] for name, _ in [*model.named_parameters(), *model.named_buffers()] if model.stays_fp32(name)}
    if held:
        parts.append(f"{', '.join(sorted(held))} in fp32")
    if routers:
        parts.append(f"routers compute in fp32 and are {'frozen' if recipe.method == 'lora' else 'trained'}")
    moments = "fp32" if recipe.train.optimizer == "adamw" else "8 bits"
    is_whole = not model.layouts and not any(isinstance(module, Elsewhere) for module in model.modules())
    return f"precision{'' if is_whole else ' of the part that the first process holds'}: {'; '.join(parts)}; moments in {moments}"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
