"""The two forms of adapter_model.safetensors, declared once: under which keys a module's tensors lie, and how their values lie there.

| form | experts of one projection | read by |
|---|---|---|
| `fused` | two tensors, A (expert, rank) x in and B out x (rank, expert), named for the layer's experts; `down_proj` wraps `up_proj`, whose keys lie under `base_layer` | PEFT on transformers 5, as `target_parameters` |
| `per_expert` | two tensors an expert, A rank x in and B out x rank, named as on disk: `experts.7.up_proj` | vLLM; as adapters of Nemotron are published |

Every other module is the same in both. Keys begin with `base_model.model.`, once, with a `model.` more, or not at all, and with the checkpoint's
prefix or transformers': all are read. What a config names is `peft_config.py`'s, files are `adapter.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nemotune.errors import CheckpointError
from nemotune.lora.layers import LoRALayer
from nemotune.models.base import CausalLM

Form = Literal["fused", "per_expert"]

PREFIXES = ("base_model.model.", "base_model.model.model.", "")  # as PEFT writes, as other tools do
SUFFIXES = {
    "lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "lora_magnitude_vector": ".lora_magnitude_vector",
    "lora_embedding_A": ".lora_embedding_A", "lora_embedding_B": ".lora_embedding_B",
}  # fmt: skip
MARKS: dict[Form, re.Pattern[str]] = {
    "fused": re.compile(r"\.experts\.(base_layer\.)*lora_[AB]\."),
    "per_expert": re.compile(r"\.experts\.\d+\."),
}
OTHERS = re.compile(r"\.experts\.(?!(base_layer\.)*lora_[AB]\.|\d+\.)")  # w1, w2 and w3 of all experts; grouped tensors; 3-D tensors


@dataclass(frozen=True)
class Entry:
    """A tensor on disk: the `which` (lora_A, ...) of a module, or of one of its experts. It may lie under any of `keys`, and is written under the first."""

    keys: tuple[str, ...]
    which: str
    expert: int | None
    shape: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """What lies there of the module's own tensor: A [..., rank, in], B [..., out, rank]."""
        if self.expert is not None:
            return whole[self.expert]
        if whole.ndim < 3:
            return whole
        # B as the transpose of a matrix, which is copied in blocks
        return whole.flatten(0, 1) if self.which == "lora_A" else whole.flatten(1).T.reshape(whole.shape[1], -1)


def form_of(keys: Iterable[str]) -> Form | None:
    """The form of an adapter with these keys, None where it has no experts. Raises CheckpointError for both at once, and for forms that are not read."""
    keys = list(keys)
    if other := next((key for key in keys if OTHERS.search(key)), None):
        raise CheckpointError(
            f"{other}: experts in a form that is not read; expected one tensor per expert (experts.0.up_proj.lora_A.weight) or PEFT's "
            "(experts.lora_A.weight): convert the adapter with the tool that wrote it"
        )
    found = {form: key for form, mark in MARKS.items() if (key := next((key for key in keys if mark.search(key)), None))}
    if len(found) > 1:
        raise CheckpointError(f"experts in two forms at once, {found['fused']} and {found['per_expert']}; write the adapter again in one")
    return next(iter(found), None)


def units(name: str, module: nn.Module, form: Form) -> list[str]:
    """What has tensors of its own: the module, or each of its experts, by the name on disk."""
    if form == "fused" or not (experts := _num_experts(module)):
        return [name]
    owner, _, last = name.rpartition(".")
    return [f"{owner}.{expert}.{last}" for expert in range(experts)]


def entries(name: str, model: CausalLM, form: Form, *, rank: int, dora: bool, adapted: Collection[str]) -> list[list[Entry]]:
    """The tensors of each unit of module `name`, A first; `adapted` are the names of all adapted modules."""
    module = plain(model.get_submodule(name))
    shapes = _shapes(module, rank, form, dora=dora)
    several = form == "per_expert" and _num_experts(module) is not None
    found = []
    for expert, unit in enumerate(units(name, module, form)):
        stems = _stems(unit, module, model, form, adapted)
        found.append([
            Entry(tuple(stem + SUFFIXES[which] for stem in stems), which, expert if several else None, shape) for which, shape in shapes.items()
        ])  # fmt: skip
    return found


def restored(tensors: Sequence[Tensor | None], which: str, module: nn.Module, form: Form, shape: tuple[int, ...]) -> Tensor:
    """The module's own tensor from those of its units; None, of an expert that is not adapted, counts as zeros of `shape`."""
    experts = _num_experts(module)
    if experts is None:
        (only,) = tensors
        assert only is not None
        return only
    if form == "per_expert":
        dtype = next(tensor.dtype for tensor in tensors if tensor is not None)
        return torch.stack([torch.zeros(shape, dtype=dtype) if tensor is None else tensor for tensor in tensors])
    (only,) = tensors
    assert only is not None
    if which == "lora_A":
        return only.unflatten(0, (experts, -1))
    return only.reshape(-1, experts).T.contiguous().unflatten(1, (len(only), -1))


def plain(module: nn.Module) -> nn.Module:
    """The module itself, where it may be adapted."""
    return module.base if isinstance(module, LoRALayer) else module


def spellings(name: str, model: CausalLM) -> list[str]:
    """transformers' name of a module of ours, and ours where that is another."""
    theirs = [alias + name.removeprefix(ours) for alias, ours in model.aliases.items() if name.startswith(ours)]
    return [*theirs, name]


def _stems(unit: str, module: nn.Module, model: CausalLM, form: Form, adapted: Collection[str]) -> list[str]:
    """What the keys of a unit may begin with, the form's own spelling first: transformers' in PEFT's, the checkpoint's in the other."""
    names = spellings(unit, model)
    if form == "per_expert":
        names = names[::-1]
    elif _num_experts(module):
        owner, _, last = unit.rpartition(".")
        nested = ".base_layer" if last == "up_proj" and f"{owner}.down_proj" in adapted else ""
        names = [name.rpartition(".")[0] + nested for name in names]
    return [prefix + name for prefix in PREFIXES for name in names]


def _shapes(module: nn.Module, rank: int, form: Form, *, dora: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of a unit's tensors on disk, A first."""
    rows = rank * (_num_experts(module) or 1) if form == "fused" else rank
    if isinstance(module, nn.Embedding):
        width, inputs = module.embedding_dim, module.num_embeddings
        shapes = {"lora_embedding_A": (rank, inputs), "lora_embedding_B": (width, rank)}
    else:
        width, shapes = module.out_features, {"lora_A": (rows, module.in_features), "lora_B": (module.out_features, rows)}
    return {**shapes, "lora_magnitude_vector": (width,)} if dora else shapes


def _num_experts(module: nn.Module) -> int | None:
    return getattr(module, "num_experts", None)
