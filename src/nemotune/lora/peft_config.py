"""adapter_config.json as PEFT 0.21 on transformers 5 has it: which modules are adapted, at which rank and alpha. Read for both forms of tensors, and written.

What PEFT imposes, tested by value against it:
- modules are named in full, by the end of their names, by a regular expression or as `all-linear`, and all that match are adapted;
- experts are `target_parameters` of one module where they are one tensor, and modules like others where they are one each (`forms.py`);
- `target_parameters` allow no dropout, so the config of such an adapter says 0: it concerns training only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, field_validator

from nemotune.errors import CheckpointError
from nemotune.lora.forms import Form, plain, spellings, units
from nemotune.lora.targets import NOT_LINEAR_BLOCKS, adaptable_modules
from nemotune.models.base import CausalLM
from nemotune.recipe import Lora

Number = TypeVar("Number", int, float)
UNUSED = (None, False, "none", [], {})  # how PEFT writes a setting that is not used
WITHOUT_EFFECT = {  # on what a trained adapter computes
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "task_type",
}  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base's weights as they are


class PeftConfig(BaseModel):
    """The keys of adapter_config.json that are read. Any other one that is set is refused."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    peft_type: Literal["LORA"] = "LORA"
    r: PositiveInt
    lora_alpha: PositiveFloat
    lora_dropout: Annotated[float, Field(ge=0, le=0.99)] = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: Any = True
    target_modules: str | frozenset[str] | None = None
    exclude_modules: str | frozenset[str] | None = None
    target_parameters: frozenset[str] | None = None
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

    def names(self, spelled: list[str], block_type: str, experts: list[str]) -> bool:
        """Whether a module that goes by `spelled` is one to adapt; where it is an expert with tensors of its own, `experts` are names of all of its layer."""
        if block_type == "experts" and _matches(self.target_parameters, experts or spelled):
            return True
        if block_type == "experts" and not experts:
            return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            chosen = block_type not in NOT_LINEAR_BLOCKS
        else:
            chosen = _matches(self.target_modules, spelled)
        return chosen and not _matches(self.exclude_modules, spelled)

    def rank_and_alpha(self, spelled: list[str]) -> tuple[int, float]:
        """Those of the module that goes by `spelled`."""
        return _first_match(self.rank_pattern, spelled, otherwise=self.r), _first_match(
            self.alpha_pattern, spelled, otherwise=self.lora_alpha
        )

    def lora(self, settings: Mapping[str, tuple[int, float]]) -> Lora:
        """The same as a recipe's section, whose targets and patterns are full names; `settings` has rank and alpha of each."""
        return Lora(
            rank=self.r, alpha=self.lora_alpha, dropout=self.lora_dropout, rslora=self.use_rslora, dora=self.use_dora, targets=tuple(settings),
            rank_pattern={name: rank for name, (rank, _) in settings.items() if rank != self.r},
            alpha_pattern={name: alpha for name, (_, alpha) in settings.items() if alpha != self.lora_alpha},
        )  # fmt: skip


def read_peft_config(path: Path) -> PeftConfig:
    """The config at `path`. Raises CheckpointError where it cannot be read or asks for more than LoRA and DoRA, naming every such key."""
    try:
        config = PeftConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc'][:1])) or 'the file'}: {item['msg']}" for item in error.errors())
        raise CheckpointError(f"{path}: {wrong}; expected a LoRA config as PEFT writes it") from error
    except (ValueError, RecursionError) as error:
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


def named_units(config: PeftConfig, model: CausalLM, form: Form) -> dict[str, list[str | None]]:
    """The modules that `config` says are adapted, in the model's order: of each its units (`forms.units`), None in place of those that it leaves out."""
    named: dict[str, list[str | None]] = {}
    for name, kind in adaptable_modules(model).items():
        all_units = units(name, plain(model.get_submodule(name)), form)
        layer = spellings(name, model) if all_units != [name] else []
        found = [unit if config.names(spellings(unit, model), kind, layer) else None for unit in all_units]
        if any(found):
            named[name] = found
    return named


def unplaced_parameters(config: PeftConfig, model: CausalLM) -> list[str]:
    """The `target_parameters` that are not experts of `model`: others lie in layouts that are not read."""
    experts = [spellings(name, model) for name, kind in adaptable_modules(model).items() if kind == "experts"]
    return [
        target
        for target in sorted(config.target_parameters or ())
        if not any(_matches(frozenset([target]), spelled) for spelled in experts)
    ]


def peft_config(lora: Lora, settings: Mapping[str, Lora], model: CausalLM, form: Form, *, base: str) -> dict[str, Any]:
    """adapter_config.json for an adapter in `form`; `settings` has what holds for each adapted module."""
    kinds = adaptable_modules(model)
    theirs = {name: spellings(name, model)[0] for name in settings}
    fused = [theirs[name] for name in settings if kinds[name] == "experts"] if form == "fused" else []
    linear = [theirs[name] for name in settings if kinds[name] != "experts"] if form == "fused" else _ends(settings, model)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "bias": "none",
        "r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora, "use_dora": lora.dora, "fan_in_fan_out": False,
        "lora_dropout": 0.0 if fused else lora.dropout, "target_modules": linear, "target_parameters": fused or None,
        "rank_pattern": {theirs[name]: its.rank for name, its in settings.items() if its.rank != lora.rank},
        "alpha_pattern": {theirs[name]: its.alpha for name, its in settings.items() if its.alpha != lora.alpha},
    }  # fmt: skip


def _ends(adapted: Collection[str], model: CausalLM) -> list[str]:
    """Names for a list of `target_modules` that reach the adapted modules, every expert by itself, and no other: of each the shortest end that does."""
    every = {name: units(name, plain(model.get_submodule(name)), "per_expert") for name in adaptable_modules(model)}
    outside = {end for name, names in every.items() if name not in adapted for unit in names for end in ends_of(unit)}
    return list(dict.fromkeys(next(end for end in ends_of(unit) if end not in outside) for name in adapted for unit in every[name]))


def ends_of(name: str) -> list[str]:
    """The name's last parts, the shortest first, itself last."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _first_match(pattern: Mapping[str, Number] | None, spellings: list[str], *, otherwise: Number) -> Number:
    """As PEFT: the value of the first key that is, as a regular expression, the name or its last parts."""
    matched = (value for key, value in (pattern or {}).items() if any(re.match(rf"(.*\.)?({key})$", name) for name in spellings))
    return next(matched, otherwise)


def _matches(targets: str | frozenset[str] | None, spellings: list[str]) -> bool:
    """As PEFT, under any of the spellings: a string is a regular expression of the whole name, of a list's names each is a name or its last parts."""
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in spellings)
    return bool(targets) and any(end in targets for name in spellings for end in ends_of(name))
