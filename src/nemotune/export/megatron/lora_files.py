"""An adapter of ours to a LoRA checkpoint that Megatron-Bridge loads: `plan_lora(opened) -> Plan`; the way back is `lora.read_lora`.

Megatron-Bridge's `LoRA` has one rank, one alpha and, for the projections that Megatron fuses, one A. Where ours have an A each, these stand
one below the other, each beside the columns of B that are its own: A = [Aq; Ak; Av], B block-diagonal, of three times the rank. Narrower
modules are widened by zeros, and alpha follows, so that every update stays what it was, exactly. (`CanonicalLoRA` keeps q, k and v apart, but
halves every `linear_fc1`, which in Nemotron-H is not gated.) Experts get an adapter each, which 0.3 does not have: `share_expert_adapters`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.export.adapters.opened import Opened
from nemotune.export.megatron.checkpoint import ADAPTER
from nemotune.export.megatron.dcp_files import ChunkToWrite, DcpFiles
from nemotune.export.megatron.fitting import Fitted, fit, same_bytes, slabs
from nemotune.export.megatron.homes import by_expert
from nemotune.export.megatron.lora import A_OF, B_OF, LinearModule, kept_slots, linear_modules, read_lora
from nemotune.export.megatron.rows import Rows, cut
from nemotune.export.megatron.side_files import write_side_files
from nemotune.export.megatron.to_megatron import ITERATION
from nemotune.export.stream import Ends, Plan
from nemotune.lora.layers import scale
from nemotune.lora.pairs import Adapter
from nemotune.models.base import CausalLM
from nemotune.weights.dtypes import TORCH_DTYPES


@dataclass(frozen=True)
class _Widened:
    """An adapter in one rank and at one scale: at which slot of a module of Megatron's each of ours begins."""

    adapter: Adapter
    rank: int
    scale: float
    firsts: dict[str, int]

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.adapter.dtype]

    def A(self, module: LinearModule, width: int, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the fused A [rank, in]; of experts [experts, rank, in] those experts."""
        if module.op is by_expert:
            return self._of_experts(module, start, stop, 0, (self.rank, width))
        A = torch.zeros(self.rank, width, dtype=self.dtype)
        for name in self._adapted(module):
            own = self.adapter.pairs[name][0]
            A[self.firsts[name] : self.firsts[name] + len(own)] = own.to(self.dtype)
        return A[start:stop]

    def B(self, module: LinearModule, runs: tuple[Rows, ...], start: int, stop: int) -> Tensor:
        """Rows of the fused B [out, rank], made of `runs`; of experts [experts, out, rank] those experts."""
        if module.op is by_expert:
            return self._of_experts(module, start, stop, 1, (runs[0].length, self.rank))
        return torch.cat([self._rows_of_B(run) for run in cut(runs, start, stop)])

    def _rows_of_B(self, run: Rows) -> Tensor:
        """Rows of B of one of our modules, at its slots."""
        B, name = torch.zeros(run.length, self.rank, dtype=self.dtype), run.name.removesuffix(".weight")
        if name in self.firsts:
            own = self.adapter.pairs[name][1][run.first : run.first + run.length]
            B[:, self.firsts[name] : self.firsts[name] + own.shape[1]] = (own * self.factor(name)).to(self.dtype)
        return B

    def factor(self, name: str) -> float:
        """What B takes over of the module's own scale: a power of two."""
        return scale(self.adapter.settings[name]) / self.scale

    def _of_experts(self, module: LinearModule, start: int, stop: int, which: int, shape: tuple[int, int]) -> Tensor:
        (name,) = module.ours
        values = torch.zeros(stop - start, *shape, dtype=self.dtype)
        if name in self.firsts:
            own = self.adapter.pairs[name][which][start:stop]
            own = own if which == 0 else own * self.factor(name)
            values[:, : own.shape[1], : own.shape[2]] = own.to(self.dtype)
        return values

    def _adapted(self, module: LinearModule) -> list[str]:
        return [name for name in module.ours if name in self.firsts]


def plan_lora(opened: Opened) -> Plan[int]:
    """What is written for an adapter; of its base only config.json is needed. The plan's report is the number of tensors that were read back.

    Raises UnsupportedError for what Megatron-Bridge's LoRA cannot hold, by name.
    """
    model, modules = opened.model, list(linear_modules(opened.model.config))
    _refuse(opened.adapter, {name for module in modules for name in module.ours})
    widened = _widen(opened.adapter, modules)
    kinds = {module.kind for module in modules if any(name in widened.firsts for name in module.ours)}
    files = DcpFiles.of(ITERATION, (chunk for module in modules if module.kind in kinds for chunk in _chunks(module, widened, model)), ())

    def finish(directory: Path, ends: Ends) -> None:
        files.write_metadata(directory, ends)
        settings = {"peft": _settings(widened, sorted(kinds))}
        write_side_files(directory, ITERATION, config=model.config, beside=opened.base_dir, more=settings)

    identity = {"format": "megatron lora", **opened.identity}
    return Plan(identity, files.output_files(), lambda directory: _verify(directory, model, widened), finish)


def _refuse(adapter: Adapter, known: set[str]) -> None:
    if adapter.magnitudes:
        raise UnsupportedError("lora.dora: Megatron's checkpoints of DoRA are not written; merge the adapter and convert the model")
    if others := sorted(set(adapter.pairs) - known):
        raise UnsupportedError(f"{others[0]}: Megatron-Bridge's LoRA has no place for its adapter; merge it and convert the model")
    base = scale(next(iter(adapter.settings.values())))
    for name, its in adapter.settings.items():
        if not math.log2(scale(its) / base).is_integer():
            raise UnsupportedError(
                f"{name}: is scaled by {scale(its):g}, others by {base:g}; Megatron-Bridge has one scale, and only powers of two between "
                "them lose nothing. Merge the adapter and convert the model"
            )


def _widen(adapter: Adapter, modules: list[LinearModule]) -> _Widened:
    """Where several modules share an A, they share its slots; else each gets slots of its own."""
    firsts, rank = {}, 0
    for module in modules:
        members, at = [name for name in module.ours if name in adapter.pairs], 0
        shared = len(members) > 1 and all(same_bytes(adapter.pairs[name][0], adapter.pairs[members[0]][0]) for name in members[1:])
        for name in members:
            firsts[name] = 0 if shared else at
            at += adapter.settings[name].rank
        rank = max(rank, adapter.settings[members[0]].rank if shared else at) if members else rank
    return _Widened(adapter, rank, scale(next(iter(adapter.settings.values()))), firsts)


def _chunks(module: LinearModule, widened: _Widened, model: CausalLM) -> Iterator[ChunkToWrite]:
    """A and B of a module; of a layer of a stack, its entries."""
    linear: Any = [model.get_submodule(name) for name in module.ours]
    width, experts = linear[0].in_features, linear[0].num_experts if module.op is by_expert else None
    lead = () if experts is None else (experts,)
    yield from _tensor(module, A_OF, (*lead, widened.rank, width), widened, model, partial(widened.A, module, width))
    rows = {f"{name}.weight": one.out_features for name, one in zip(module.ours, linear, strict=True)}
    if experts is not None:
        ((name, out),) = rows.items()
        runs = (Rows(name, 0, out),)
        yield from _tensor(module, B_OF, (experts, out, widened.rank), widened, model, partial(widened.B, module, runs))
        return
    for home in module.op(B_OF, f"{module.template}.weight", model.config):
        each: Fitted = fit(home, lambda name: (rows[name], widened.rank))
        (runs,) = each.home.entries
        yield from _tensor(module, home.name, each.shape, widened, model, partial(widened.B, module, runs))


def _tensor(
    module: LinearModule, name: str, shape: tuple[int, ...], widened: _Widened, model: CausalLM, make: Callable[[int, int], Tensor]
) -> Iterator[ChunkToWrite]:
    """The tensor of one layer: entries of a stack where the layers are one; `make` makes some rows of it."""
    whole = f"{module.stacked_name}{ADAPTER}{name}"
    lead = () if module.layer is None else (module.layer,)
    full = shape if module.layer is None else (model.config.num_layers, *shape)
    for start, stop in slabs(shape[0], shape[1:]):
        sizes = (*(1 for _ in lead), stop - start, *shape[1:])
        offsets = (*lead, start, *(0 for _ in shape[1:]))
        yield ChunkToWrite(whole, full, widened.dtype, offsets, sizes, partial(_shaped, make, start, stop, sizes))


def _shaped(make: Callable[[int, int], Tensor], start: int, stop: int, sizes: tuple[int, ...]) -> Tensor:
    return make(start, stop).reshape(sizes)


def _settings(widened: _Widened, targets: list[str]) -> dict[str, Any]:
    """The `peft` section of run_config.yaml."""
    alpha = widened.scale * widened.rank
    per_expert = any(".experts." in name for name in widened.firsts)
    return {
        "_target_": "megatron.bridge.peft.lora.LoRA",
        "a2a_experimental": False, "alpha": int(alpha) if float(alpha).is_integer() else alpha, "canonical_mapping": {}, "dim": widened.rank,
        "dropout": widened.adapter.lora.dropout, "dropout_position": "pre", "exclude_modules": [], "lora_A_init_method": "xavier",
        "lora_B_init_method": "zero", "lora_dtype": None, "target_modules": targets, **({"share_expert_adapters": False} if per_expert else {}),
    }  # fmt: skip


def _verify(directory: Path, model: CausalLM, widened: _Widened) -> int:
    """Every pair read back, against the adapter's own where it adds something; modules that were added add nothing."""
    back, own = read_lora(directory, model), widened.adapter
    wrong = [name for name in back.pairs if not _is_as_written(name, back, widened)] + sorted(own.pairs.keys() - back.pairs.keys())
    if wrong:
        raise CheckpointError(
            f"{directory}: {len(wrong)} of {len(own.pairs)} modules read back are not the adapter's, first {wrong[0]}; nothing was kept. Convert again"
        )
    return 2 * len(own.pairs)


def _is_as_written(name: str, back: Adapter, widened: _Widened) -> bool:
    A, B = back.pairs[name]
    if name not in widened.firsts or not B.any():
        return not B.any() and (name not in widened.firsts or not widened.adapter.pairs[name][1].any())
    own_A, own_B = widened.adapter.pairs[name]
    slots, dtype = kept_slots(own_B), widened.dtype
    as_own = math.isclose(scale(back.settings[name]), widened.scale, rel_tol=1e-12)  # alpha was rounded
    return as_own and same_bytes(A, own_A[..., slots, :].to(dtype)) and same_bytes(B, (own_B[..., slots] * widened.factor(name)).to(dtype))
