"""PEFT's form of an adapter (PEFT 0.21 on transformers 5): what `adapter_config.json` says, and the keys of a module's tensors.

What PEFT imposes, tested by value against it:
- module names begin with `base_model.model.`, and nemotron_h's `backbone.` is called `model.` (other tools keep it: both are read);
- modules are named in full, by the end of their names, by a regular expression or as `all-linear`, and all that match are adapted;
- experts are `target_parameters` of one module: `down_proj` wraps `up_proj`, whose keys therefore lie under `experts.base_layer`;
- `target_parameters` allow no dropout, so the config of such an adapter says 0: it concerns training only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, field_validator

from nemotune.errors import CheckpointError
from nemotune.lora.targets import NOT_LINEAR_BLOCKS, adaptable_modules, module_settings
from nemotune.models.base import CausalLM
from nemotune.recipe import Lora

Number = TypeVar("Number", int, float)
PREFIX = "base_model.model."
SUFFIXES = {
    "lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "lora_magnitude_vector": ".lora_magnitude_vector",
    "lora_embedding_A": ".lora_embedding_A", "lora_embedding_B": ".lora_embedding_B",
}  # fmt: skip
UNUSED = (None, False, "none", [], {})  # how PEFT writes a setting that is not used
WITHOUT_EFFECT = {  # on what a trained adapter computes
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "task_type",
}  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base's weights as they are


class PeftConfig(BaseModel):
    """The keys of adapter_config.json that are read. Any other one that is set is refused."""

    model_config = ConfigDict(frozen=True, extra="allow")

    peft_type: Literal["LORA"] = "LORA"
    r: PositiveInt
    lora_alpha: PositiveFloat
    lora_dropout: Annotated[float, Field(ge=0, le=0.99)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: Any = True
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    target_parameters: list[str] | None = None
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, PositiveFloat] | None = None

    @field_validator("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
    @classmethod
    def _is_a_pattern(cls, value: Any) -> Any:
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"got {pattern!r}, no regular expression ({error})") from error
        return value

    def names(self, spellings: list[str], block_type: str) -> bool:
        """Whether a module that goes by `spellings` is one to adapt."""
        if block_type == "experts":
            return _matches(self.target_parameters, spellings)
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            chosen = block_type not in NOT_LINEAR_BLOCKS
        else:
            chosen = _matches(self.target_modules, spellings)
        return chosen and not _matches(self.exclude_modules, spellings)

    def rank_of(self, spellings: list[str]) -> int:
        """The rank of the module that goes by `spellings`."""
        return _first_match(self.rank_pattern, spellings, otherwise=self.r)

    def alpha_of(self, spellings: list[str]) -> float:
        """Its alpha."""
        return _first_match(self.alpha_pattern, spellings, otherwise=self.lora_alpha)

    def lora(self, targets: Mapping[str, list[str]]) -> Lora:
        """The same as a recipe's section, whose targets and patterns are full names; `targets` has what else each goes by."""
        return Lora(
            rank=self.r, alpha=self.lora_alpha, dropout=self.lora_dropout, rslora=self.use_rslora, dora=self.use_dora, targets=tuple(targets),
            rank_pattern={name: rank for name, spelled in targets.items() if (rank := self.rank_of(spelled)) != self.r},
            alpha_pattern={name: alpha for name, spelled in targets.items() if (alpha := self.alpha_of(spelled)) != self.lora_alpha},
        )  # fmt: skip


def read_peft_config(path: Path) -> PeftConfig:
    """The config at `path`. Raises CheckpointError where it cannot be read or asks for more than LoRA and DoRA, naming every such key."""
    try:
        config = PeftConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc'][:1])) or 'the file'}: {item['msg']}" for item in error.errors())
        raise CheckpointError(f"{path}: {wrong}; expected a LoRA config as PEFT writes it") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy the adapter again") from error
    refused = {key: value for key, value in (config.model_extra or {}).items() if value not in UNUSED and key not in WITHOUT_EFFECT}
    if config.init_lora_weights not in (*PLAIN_STARTS, None):
        refused["init_lora_weights"] = config.init_lora_weights
    if refused:
        told = ", ".join(f"{key}: {json.dumps(value)}" for key, value in refused.items())
        raise CheckpointError(
            f"{path}: only LoRA and DoRA are computed here, got {told}; merge this adapter with PEFT and use the merged model"
        )
    return config


def named_modules(config: PeftConfig, model: CausalLM) -> dict[str, str]:
    """Block type of every module that `config` says is adapted, by our name, in the model's order."""
    return {name: kind for name, kind in adaptable_modules(model).items() if config.names(spellings(name, model), kind)}


def unplaced_parameters(config: PeftConfig, model: CausalLM) -> list[str]:
    """The `target_parameters` that are not experts of `model`: others lie in layouts that are not read."""
    experts = [spellings(name, model) for name, kind in adaptable_modules(model).items() if kind == "experts"]
    return [target for target in config.target_parameters or () if not any(_matches([target], spelled) for spelled in experts)]


def peft_keys(name: str, named: Mapping[str, str], model: CausalLM) -> list[str]:
    """What the keys of a module's tensors may begin with, PEFT's own spelling first; `named` has the block type of all adapted ones."""
    keys = [PREFIX + spelled for spelled in spellings(name, model)]
    if named[name] != "experts":
        return keys
    owner, _, last = name.rpartition(".")
    nested = ".base_layer" if last == "up_proj" and f"{owner}.down_proj" in named else ""
    return [key.rpartition(".")[0] + nested for key in keys]


def peft_config(named: Mapping[str, str], lora: Lora, model: CausalLM, *, base: str) -> dict[str, Any]:
    """adapter_config.json for an adapter of the modules `named`."""
    theirs = {name: spellings(name, model)[0] for name in named}
    linear = [theirs[name] for name, kind in named.items() if kind != "experts"]
    experts = [theirs[name] for name, kind in named.items() if kind == "experts"]
    settings = module_settings(named, lora)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "bias": "none",
        "r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "use_dora": lora.dora, "fan_in_fan_out": False,
        "lora_dropout": 0.0 if experts else lora.dropout, "target_modules": linear, "target_parameters": experts or None,
        "rank_pattern": {theirs[name]: its.rank for name, its in settings.items() if its.rank != lora.rank},
        "alpha_pattern": {theirs[name]: its.alpha for name, its in settings.items() if its.alpha != lora.alpha},
    }  # fmt: skip


def spellings(name: str, model: CausalLM) -> list[str]:
    """transformers' name of a module of ours, and ours where that is another."""
    theirs = [alias + name.removeprefix(ours) for alias, ours in model.aliases.items() if name.startswith(ours)]
    return [*theirs, name]


def _first_match(pattern: Mapping[str, Number] | None, spellings: list[str], *, otherwise: Number) -> Number:
    """As PEFT: the value of the first key that is, as a regular expression, the name or its last parts."""
    matched = (value for key, value in (pattern or {}).items() if any(re.match(rf"(.*\.)?({key})$", name) for name in spellings))
    return next(matched, otherwise)


def _matches(targets: str | list[str] | None, spellings: list[str]) -> bool:
    """As PEFT, under any of the spellings: a string is a regular expression of the whole name, a list holds names or their last parts."""
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in spellings)
    return any(f".{name}".endswith(f".{target}") for target in targets or () for name in spellings)
