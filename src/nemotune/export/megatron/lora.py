"""A LoRA checkpoint of Megatron-Bridge as an adapter of ours: `read_lora(path, model) -> Adapter`, to merge, or to write as PEFT writes it.

`LoRA` has one A for the projections that Megatron fuses, `CanonicalLoRA` one for each; adapters of experts are 3-D, or 2-D where all experts
share one. B's rows move as the weight's do (`homes.py`). What a rank component with a B of zeros adds is nothing, so it is left out: adapters
that `lora_files.py` widened become what they were. The way there is `lora_files.plan_lora(opened) -> Plan`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.export.megatron.checkpoint import ADAPTER, MegatronCheckpoint, finite, open_megatron
from nemotune.export.megatron.fitting import fitted_to, made_of, refuse
from nemotune.export.megatron.homes import LINEAR, Config, Op, by_expert
from nemotune.export.megatron.rows import Rows
from nemotune.lora.pairs import Adapter, Pairs
from nemotune.lora.targets import adaptable_modules, module_settings
from nemotune.models.base import CausalLM
from nemotune.models.config import LlamaConfig
from nemotune.recipe import Lora
from nemotune.weights.dcp import StoredTensor
from nemotune.weights.dtypes import NAMES

FORMS = ("LoRA", "VLMLoRA", "CanonicalLoRA")
CANONICAL = {"q_proj": "adapter_q", "k_proj": "adapter_k", "v_proj": "adapter_v", "gate_proj": "adapter_gate", "up_proj": "adapter_up"}
A_OF, B_OF = "linear_in.weight", "linear_out.weight"


@dataclass(frozen=True)
class LinearModule:
    """A linear module of Megatron in one layer, `theirs`, and those of ours that it is made of; `layer` is its number where layers are stacked."""

    theirs: str
    ours: tuple[str, ...]
    template: str  # of our names, as `homes.py` has them
    op: Op
    layer: int | None

    @property
    def kind(self) -> str:
        """What targets of Megatron-Bridge call it."""
        return self.theirs.rpartition(".")[2]

    @property
    def stacked_name(self) -> str:
        """Its name where the layers are one tensor."""
        return self.theirs if self.layer is None else self.theirs.replace(f"decoder.layers.{self.layer}.", "decoder.layers.")


def linear_modules(config: Config) -> Iterator[LinearModule]:
    """Every linear module of the layers, in order."""
    dense = isinstance(config, LlamaConfig)
    for i in range(config.num_layers):
        block, ours = ("llama", f"model.layers.{i}") if isinstance(config, LlamaConfig) else (config.block_types[i], f"backbone.layers.{i}")
        for name, theirs, op in LINEAR[block]:
            parts = next((parts for fused, parts in (("qkv", "qkv"), ("gate_up", ("gate", "up"))) if fused in name), None)
            named = [name.replace("gate_up", part).replace("qkv", part) for part in parts] if parts else [name]
            yield LinearModule(
                f"decoder.layers.{i}.{theirs}", tuple(f"{ours}.{n}" for n in named), f"{ours}.{name}", op, i if dense else None
            )


@dataclass(frozen=True)
class _Found:
    """Where the A and the B of one of our modules lie; `parts` of B one below the other. `experts`: how many share a 2-D one."""

    A: Rows
    B: tuple[Rows, ...]
    experts: int | None


def read_lora(path: Path, model: CausalLM) -> Adapter:
    """The LoRA checkpoint at `path` as an adapter of `model` (on the meta device or not). Its pairs are read when they are asked for.

    Raises CheckpointError naming every tensor that has no place or does not fit, MissingFileError, UnsupportedError for other methods.
    """
    checkpoint = open_megatron(path)
    settings = _settings(checkpoint)
    stored, problems = checkpoint.weights, []
    found: dict[str, _Found] = {}
    used: set[str] = set()
    for module in linear_modules(model.config):
        try:
            for name, one in _of_module(module, stored, model.config):
                found[name] = one
                used |= {one.A.name, *(run.name for run in one.B)}
        except (ValueError, KeyError) as error:
            problems.append(f"{error.args[0]}: missing" if isinstance(error, KeyError) else str(error))
    named = {name: kind for name, kind in adaptable_modules(model).items() if name in found}
    problems += [f"{name}: has no place in an adapter of {model.family}" for name in stored if name not in used]
    problems += [problem for name in named for problem in _misfits(name, found[name], stored, model)]
    refuse(checkpoint.directory, problems or ([] if found else ["it holds no adapter"]), "Check that adapter and base belong together")
    kept = {name: slots for name in named if (slots := _kept(checkpoint, found[name]))}
    named = {name: kind for name, kind in named.items() if name in kept}
    refuse(checkpoint.directory, [] if kept else ["all of its values are zeros"], "Check that it is a checkpoint of a training that began")
    ranks = {name: len(slots) for name, slots in kept.items()}
    rank = max(ranks.values())
    alpha = {name: settings["alpha"] * len(slots) / stored[found[name].A.name].shape[-2] for name, slots in kept.items()}
    common = alpha[max(ranks, key=ranks.__getitem__)]
    lora = Lora(
        rank=rank, alpha=common, dropout=settings.get("dropout", 0.0), targets=tuple(named),
        rank_pattern={name: its for name, its in ranks.items() if its != rank},
        alpha_pattern={name: its for name, its in alpha.items() if its != common},
    )  # fmt: skip
    readers: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {name: partial(_pair, checkpoint, found[name], kept[name]) for name in named}
    dtypes = {stored[name].dtype for name in used}
    return Adapter(lora, Pairs(readers), {}, module_settings(named, lora), NAMES[dtypes.pop()] if len(dtypes) == 1 else "F32")


def kept_slots(B: Tensor) -> list[int]:
    """The rank components that add something, all of them where none does."""
    kept = (B != 0).flatten(0, -2).any(0).nonzero().flatten().tolist()
    return kept or list(range(B.shape[-1]))


def _settings(checkpoint: MegatronCheckpoint) -> dict[str, Any]:
    """How the adapter was made."""
    settings = checkpoint.run_config.get("peft")
    where = checkpoint.directory / "run_config.yaml"
    if not isinstance(settings, dict) or not _is_number(settings.get("alpha"), least=math.ulp(0.0), most=sys.float_info.max):
        raise CheckpointError(
            f"{where}: says no peft.alpha over 0, without which the adapter's scale is not known; copy the run_config.yaml of its run"
        )
    if not _is_number(dropout := settings.get("dropout", 0.0), least=0.0, most=0.99):
        raise CheckpointError(f"{where}: peft.dropout: got {dropout!r}, expected 0 to 0.99; copy the run_config.yaml of its run")
    form = str(settings.get("_target_", "")).rpartition(".")[2]
    if form not in FORMS:
        raise UnsupportedError(
            f"{where}: peft._target_: got {form or 'nothing'}, expected one of {', '.join(FORMS)}; merge it with Megatron-Bridge"
        )
    return settings


def _is_number(value: Any, *, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _of_module(module: LinearModule, stored: dict[str, StoredTensor], config: Config) -> Iterator[tuple[str, _Found]]:
    """Our modules that are adapted through it."""
    base = f"{module.theirs}{ADAPTER}"
    if (A := _place(base + A_OF, stored, module)) is not None:
        if module.op is by_expert:
            yield module.ours[0], _of_experts(module, A, stored, config)
            return
        fitted = []
        for home in module.op(base + B_OF, f"{module.template}.weight", config):
            run = _required(home.name, stored, module)
            fitted.append((fitted_to(home, _shape(run, stored), vocab_size=config.vocab_size), run))
        sources, gaps = made_of(each for each, _ in fitted)
        runs = {each.name: run for each, run in fitted}
        for name, parts in sources.items():
            yield (
                name.removesuffix(".weight"),
                _Found(A, tuple(replace(p, name=runs[p.name].name, entry=runs[p.name].entry) for p in parts), None),
            )
        if gaps:
            raise ValueError(gaps[0])
    for name in module.ours:
        own = f"{base}{CANONICAL.get(name.rpartition('.')[2])}."
        if (A := _place(own + A_OF, stored, module)) is not None:
            B = _required(own + B_OF, stored, module)
            yield name, _Found(A, (replace(B, count=_shape(B, stored)[0]),), None)


def _of_experts(module: LinearModule, A: Rows, stored: dict[str, StoredTensor], config: Config) -> _Found:
    B = _required(f"{module.theirs}{ADAPTER}{B_OF}", stored, module)
    return _Found(A, (B,), getattr(config, "n_routed_experts", 0))


def _place(name: str, stored: dict[str, StoredTensor], module: LinearModule) -> Rows | None:
    """Where a tensor of the module lies: under its own name, or as a layer of a stack that has it."""
    if name in stored:
        return Rows(name)
    stack = name.replace(module.theirs, module.stacked_name)
    if module.layer is None or stack not in stored:
        return None
    tensor = stored[stack]
    lead = [1] + [0] * (len(tensor.shape) - 1)
    has_any = any(chunk.overlap([module.layer, *lead[1:]], [1, *tensor.shape[1:]])[1][0] for chunk in tensor.chunks)
    return Rows(stack, entry=module.layer) if has_any else None


def _required(name: str, stored: dict[str, StoredTensor], module: LinearModule) -> Rows:
    if (run := _place(name, stored, module)) is None:
        raise KeyError(name)
    return run


def _shape(run: Rows, stored: dict[str, StoredTensor]) -> tuple[int, ...]:
    return stored[run.name].shape[0 if run.entry is None else 1 :]


def _misfits(name: str, found: _Found, stored: dict[str, StoredTensor], model: CausalLM) -> list[str]:
    """What does not fit the module, in words."""
    module: Any = model.get_submodule(name)
    A, B = _shape(found.A, stored), _shape(found.B[0], stored)
    rows = sum(run.count or B[-2] for run in found.B)
    shapes = {"A": (A, A[-2:], (A[-2], module.in_features)), "B": (B, (rows, B[-1]), (module.out_features, A[-2]))}
    problems = [f"{name}: got {which} of {got}, expected {fits}" for which, (_, got, fits) in shapes.items() if got != fits]
    leads = {shape[:-2] for shape, _, _ in shapes.values()} - {()}
    problems += [f"{name}: got {lead[0]} experts, expected {found.experts}" for lead in leads if lead != (found.experts,)]
    return problems


def _read(checkpoint: MegatronCheckpoint, run: Rows) -> Tensor:
    shape = _shape(run, checkpoint.stored.tensors)
    if len(shape) == 2:
        return checkpoint.rows(replace(run, count=run.count or shape[0]))
    return finite(checkpoint.stored.read(run.name), f"{checkpoint.directory}: {run.name}")


def _values(checkpoint: MegatronCheckpoint, found: _Found) -> tuple[Tensor, Tensor]:
    A, B = _read(checkpoint, found.A), torch.cat([_read(checkpoint, run) for run in found.B], dim=-2)
    if found.experts is None:
        return A, B
    return A.expand(found.experts, -1, -1), B.expand(found.experts, -1, -1)


def _kept(checkpoint: MegatronCheckpoint, found: _Found) -> list[int]:
    """The slots of a module that count, none where its adapter is of zeros, which nothing would train either."""
    A, B = _values(checkpoint, found)
    return kept_slots(B) if A.any() or B.any() else []


def _pair(checkpoint: MegatronCheckpoint, found: _Found, slots: list[int]) -> tuple[Tensor, Tensor]:
    A, B = _values(checkpoint, found)
    if len(slots) == B.shape[-1]:
        return A, B
    return A[..., slots, :].contiguous(), B[..., slots].contiguous()
