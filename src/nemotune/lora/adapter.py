"""Adapters on disk in PEFT's form (PEFT 0.21 on transformers 5): `adapter_config.json` and `adapter_model.safetensors`.

Differences of names and layouts that PEFT imposes, tested by value against it:
- module names begin with `base_model.model.`, and nemotron_h's `backbone.` is called `model.`;
- experts are `target_parameters` of one module: `down_proj` wraps `up_proj`, whose keys therefore lie under `experts.base_layer`;
- A of experts is flattened as (expert, rank) x in, B as out x (rank, expert);
- `target_parameters` allow no dropout, so the config of such an adapter says 0: it concerns training only.
Every key written or read is counted: one without a home is an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nemotune.errors import CheckpointError, MissingFileError
from nemotune.files import staged_directory
from nemotune.lora.dropout import DropoutKeys
from nemotune.lora.layers import LoRAExperts, LoRALayer, lora_modules
from nemotune.lora.targets import apply_lora
from nemotune.models.base import CausalLM
from nemotune.recipe import Lora
from nemotune.weights import TensorInfo, WritePlan, write_checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
OUT_PROJ_NOTE = "PEFT refuses Mamba's out_proj, which this adapter has: it loads in nemotune and merges"


@dataclass(frozen=True)
class Adapter:
    """An adapter as read: A [..., rank, in] and B [..., out, rank] by the name of the module that they adapt."""

    lora: Lora
    pairs: dict[str, tuple[Tensor, Tensor]]

    def delta(self, module: str, expert: int | None = None) -> Tensor:
        """The update of a module's weight (of one expert's), fp32."""
        A, B = self.pairs[module] if expert is None else (t[expert] for t in self.pairs[module])
        return B.float() @ A.float() * self.scale

    @property
    def scale(self) -> float:
        return self.lora.alpha / (self.lora.rank**0.5 if self.lora.rslora else self.lora.rank)


def save_adapter(model: CausalLM, directory: Path, lora: Lora, *, base: str, overwrite: bool = False) -> list[str]:
    """Write the adapter of `model` into `directory`. Returns notes on where it will not load."""
    layers = dict(lora_modules(model))
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        key = _peft_key(name, layers, model)
        A, B = layer.lora_A.detach().cpu(), layer.lora_B.detach().cpu()
        if isinstance(layer, LoRAExperts):
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = A, B
    assert len(tensors) == 2 * len(layers), "two modules of one name"
    plan = WritePlan(tuple(TensorInfo(key, WEIGHTS, "F32", tuple(tensor.shape)) for key, tensor in tensors.items()))
    with staged_directory(directory, overwrite=overwrite, needed_bytes=plan.num_bytes) as aside:
        write_checkpoint(aside, plan, lambda info: tensors[info.name])
        (aside / CONFIG).write_text(json.dumps(_peft_config(layers, lora, model, base), indent=2) + "\n", encoding="utf-8")
    return [OUT_PROJ_NOTE] if any(name.endswith(".out_proj") for name in layers) else []


def load_adapter(model: CausalLM, directory: Path) -> DropoutKeys:
    """Adapt `model` as the adapter in `directory` says and fill in its values. Raises CheckpointError for keys that do not fit."""
    adapter = read_adapter(directory, model)
    keys = apply_lora(model, adapter.lora)
    for name, layer in lora_modules(model):
        for parameter, value in zip((layer.lora_A, layer.lora_B), adapter.pairs[name], strict=True):
            with torch.no_grad():
                parameter.copy_(value)
    return keys


def read_adapter(directory: Path, model: CausalLM) -> Adapter:
    """The adapter in `directory`, its shapes checked against `model` (which may be on the meta device and stays as it is)."""
    config, tensors = _read_files(Path(directory))
    lora = Lora(
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        rslora=config.get("use_rslora", False),
        targets=("lm_head",),
    )
    modules = dict(model.named_modules())
    pairs, problems = {}, []
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        stem = key.removesuffix(".lora_A.weight")
        name = _native_name(stem, config, model)
        A, B = tensors.pop(key), tensors.pop(f"{stem}.lora_B.weight", None)
        if B is None or name not in modules:
            problems.append(f"{stem}: " + ("has no lora_B" if B is None else f"no module {name} in {model.family}"))
            continue
        experts = getattr(modules[name], "num_experts", None)
        if experts:
            A, B = A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)
        expected = (lora.rank, modules[name].in_features), (modules[name].out_features, lora.rank)
        if (got := (tuple(A.shape[-2:]), tuple(B.shape[-2:]))) != expected:
            problems.append(f"{name}: got A and B of {got}, expected {expected}")
        pairs[name] = (A, B)
    problems += [f"{key}: has no place in the model" for key in tensors]
    if problems:
        raise CheckpointError(f"{directory}: {len(problems)} keys do not fit {model.family}:\n  " + "\n  ".join(problems[:8]))
    return Adapter(lora.model_copy(update={"targets": tuple(pairs)}), pairs)


def _read_files(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for file in (CONFIG, WEIGHTS):
        if not (directory / file).is_file():
            raise MissingFileError(f"{directory / file}: no such file; expected an adapter directory as PEFT writes it")
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: cannot be read ({error}); copy the adapter again") from error
    if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise CheckpointError(f"{directory / CONFIG}: DoRA and per-module ranks are not supported yet")
    return config, tensors


def _peft_name(name: str, model: CausalLM) -> str:
    """transformers' name of a module of ours."""
    for theirs, ours in model.aliases.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _peft_key(name: str, layers: dict[str, LoRALayer], model: CausalLM) -> str:
    """PEFT's key of a module: the projections of experts share their owner's, nested when both are adapted."""
    key = PREFIX + _peft_name(name, model)
    if not isinstance(layers[name], LoRAExperts):
        return key
    owner, _, last = name.rpartition(".")
    nested = last == "up_proj" and f"{owner}.down_proj" in layers
    return key.rpartition(".")[0] + (".base_layer" if nested else "")


def _native_name(stem: str, config: dict[str, Any], model: CausalLM) -> str:
    """The inverse of `_peft_key`; `target_parameters` say which projection of the experts lies under its owner's name."""
    name = stem.removeprefix(PREFIX)
    if name.endswith(".experts.base_layer"):
        name = name.removesuffix("base_layer") + "up_proj"
    elif name.endswith(".experts"):
        parameters = config.get("target_parameters") or []
        name += ".down_proj" if any(f"{name}.down_proj".endswith(parameter) for parameter in parameters) else ".up_proj"
    for theirs, ours in model.aliases.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _peft_config(layers: dict[str, LoRALayer], lora: Lora, model: CausalLM, base: str) -> dict[str, Any]:
    experts = [_peft_name(name, model) for name, layer in layers.items() if isinstance(layer, LoRAExperts)]
    linear = [_peft_name(name, model) for name, layer in layers.items() if not isinstance(layer, LoRAExperts)]
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "bias": "none",
        "r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "use_dora": False, "fan_in_fan_out": False,
        "lora_dropout": 0.0 if experts else lora.dropout, "target_modules": linear, "target_parameters": experts or None,
    }  # fmt: skip
