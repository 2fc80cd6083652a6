"""Which modules LoRA adapts, and at which rank: block types, module names or `default`, and the table that shows what that came to.

A target or a pattern's key that matches nothing is an error. The router is never a target: its choice is part of the base. Nor are
embeddings that the head shares: an adapter changes what goes in alone, a merged weight what comes out as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from nemotune.errors import RecipeError, UnsupportedError, did_you_mean
from nemotune.lora.dropout import DropoutKeys
from nemotune.lora.layers import LoRALayer, wrap
from nemotune.models.base import CausalLM
from nemotune.models.layers import Elsewhere, GroupedLinear, Linear
from nemotune.models.loading import build_model
from nemotune.models.quantize import quantized_parameters
from nemotune.recipe import Lora

NOT_LINEAR_BLOCKS = ("head", "embeddings")
NOT_BY_DEFAULT = re.compile(r"\.mixer\.out_proj$")  # PEFT refuses Mamba's out_proj: adapters of the default load everywhere


@dataclass(frozen=True)
class CoverageRow:
    """One block type: layers of the model that have it, modules adapted of those there are, parameters and bytes of their adapters."""

    block_type: str
    layers: int
    modules: int
    adapted: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Coverage:
    """What LoRA reaches, block type by block type. `base_parameters` counts the frozen model."""

    rows: tuple[CoverageRow, ...]
    base_parameters: int

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    def to_json(self) -> dict[str, object]:
        return {"rows": [asdict(row) for row in self.rows], "parameters": self.parameters, "base_parameters": self.base_parameters}


def apply_lora(model: CausalLM, lora: Lora, *, seed: int = 0) -> DropoutKeys:
    """Freeze the model and adapt the targets in place, those that this process holds. Returns the keys that its dropout draws from.

    Raises RecipeError for targets and keys of patterns that match nothing in the whole model.
    """
    whole = build_model(model.config) if any(isinstance(module, Elsewhere) for module in model.modules()) else model
    kinds, here = adaptable_modules(whole), adaptable_modules(model)
    settings = module_settings({name: kinds[name] for name in matched_modules(whole, lora.targets)}, lora)
    model.requires_grad_(False)
    keys = DropoutKeys()
    for name, its in settings.items():
        if name not in here:
            continue
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, wrap(model.get_submodule(name), its, name=name, keys=keys, seed=seed))
    return keys


def matched_modules(model: CausalLM, targets: str | tuple[str, ...]) -> list[str]:
    """The names of the modules that `targets` reach, in the model's order.

    Raises RecipeError naming every target that reaches none, UnsupportedError for embeddings that are tied to the head.
    """
    modules = adaptable_modules(model)
    if targets == "default":
        return [name for name, block_type in modules.items() if block_type not in NOT_LINEAR_BLOCKS and not NOT_BY_DEFAULT.search(name)]
    problems, chosen = [], set()
    for target in targets:
        matched = _reached(target, modules)
        if not matched:
            problems.append(f"lora.targets: '{target}' matches no module of {model.family}.{_suggestion(target, modules)}")
        chosen.update(matched)
    if problems:
        raise RecipeError("\n".join(problems))
    refuse_shared_embeddings(chosen, model)
    return [name for name in modules if name in chosen]


def refuse_shared_embeddings(names: Iterable[str], model: CausalLM) -> None:
    """Raise UnsupportedError where `names` hold embeddings that are tied to the head."""
    shared = [name for name in names if model.config.tie_word_embeddings and model.get_submodule(name) is model.embeddings]
    if shared:
        raise UnsupportedError(
            f"lora.targets: {shared[0]} is tied to the head (tie_word_embeddings), so an adapter on it would train the input alone and, merged, "
            "change the output too; leave embeddings out, or train with method: full"
        )


def module_settings(adapted: Mapping[str, str], lora: Lora) -> dict[str, Lora]:
    """What holds for each of the adapted modules (name -> block type): `lora` with the rank and the alpha that its patterns give it.

    Raises RecipeError naming every key that decides for none of them, UnsupportedError for DoRA on experts and embeddings.
    """
    (ranks, wrong_ranks), (alphas, wrong_alphas) = _decided(lora.rank_pattern, adapted), _decided(lora.alpha_pattern, adapted)
    problems = [f"lora.rank_pattern: {wrong}" for wrong in wrong_ranks] + [f"lora.alpha_pattern: {wrong}" for wrong in wrong_alphas]
    if problems:
        raise RecipeError("\n".join(problems))
    not_linear = {"experts", "embeddings"}
    if lora.dora and not_linear & set(adapted.values()):
        linear = {name: kind for name, kind in adapted.items() if kind not in not_linear}
        # by name where the block type says more (out_proj), or is no target
        others = dict.fromkeys(name.rpartition(".")[2] if kind in ("mamba", "head") else kind for name, kind in linear.items())
        raise UnsupportedError(
            f"lora.dora: DoRA is for linear layers, not for experts or embeddings; use lora.targets=[{', '.join(others) or 'attention'}], or lora.dora=false"
        )
    plain = lora.model_copy(update={"rank_pattern": {}, "alpha_pattern": {}})
    return {name: plain.model_copy(update={"rank": ranks.get(name, lora.rank), "alpha": alphas.get(name, lora.alpha)}) for name in adapted}


def _decided(pattern: Mapping[str, Any], adapted: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The value of each module that a key matches, the first such key's; and what is wrong with keys that decide for none."""
    values: dict[str, Any] = {}
    problems = []
    for key, value in pattern.items():
        matched = _reached(key, adapted)
        if not matched:
            problems.append(f"'{key}' matches no adapted module.{_suggestion(key, adapted)}")
        elif values.keys() >= set(matched):
            problems.append(
                f"'{key}' decides nothing, since the first key that matches a module counts. Put it before the more general one"
            )
        values = dict.fromkeys(matched, value) | values
    return values, problems


def _reached(target: str, modules: Mapping[str, str]) -> list[str]:
    return [name for name, block_type in modules.items() if target == block_type or f".{name}".endswith(f".{target}")]


def _suggestion(target: str, modules: Mapping[str, str]) -> str:
    known = {*modules.values(), *(name.rsplit(".", 1)[-1] for name in modules)} - {"head"}
    return f"{did_you_mean(target, known)} Known: {', '.join(sorted(known))}"


def adaptable_modules(model: CausalLM) -> dict[str, str]:
    """Block type of every module that LoRA can adapt, by name."""
    kinds = (Linear, GroupedLinear, nn.Embedding, LoRALayer)
    return {
        name: "embeddings" if module is model.embeddings else _block_type(name, model.linear_blocks)
        for name, module in model.named_modules()
        if isinstance(module, kinds) and not name.endswith(".base")
    }


def coverage(model: CausalLM) -> Coverage:
    """The table of what is adapted in `model`, after `apply_lora`; its shapes may be on the meta device."""
    rows = []
    kinds = adaptable_modules(model)
    for block_type in dict.fromkeys(kinds.values()):
        names = [name for name, kind in kinds.items() if kind == block_type]
        adapted = [module for module in map(model.get_submodule, names) if isinstance(module, LoRALayer)]
        parameters = sum(p.numel() for layer in adapted for p in layer.parameters(recurse=False))
        layers = len({match[1] for name in names if (match := re.search(r"\.layers\.(\d+)\.", name))})
        rows.append(CoverageRow(block_type, layers, len(names), len(adapted), parameters, parameters * torch.float32.itemsize))
    wide = sum(p.numel() for name, p in model.named_parameters() if not _is_adapter(name))
    return Coverage(tuple(rows), wide + quantized_parameters(model))


def _is_adapter(name: str) -> bool:
    return name.rpartition(".")[2].startswith("lora_")


def _block_type(name: str, patterns: Mapping[str, str]) -> str:
    return next((block_type for block_type, pattern in patterns.items() if re.search(pattern + "$", name)), "head")
