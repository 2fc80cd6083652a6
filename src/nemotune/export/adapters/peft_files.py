"""An adapter as adapter_config.json and adapter_model.safetensors, in either form of `lora/forms.py`: for PEFT fused, for vLLM one tensor per expert.

Every tensor is read back and compared before the directory takes its name. What vLLM cannot read is refused before that: its loader takes rank and
alpha from `r` and `lora_alpha` alone, knows neither DoRA nor a serving rank over 512, and wants all experts of a layer (vllm/lora/peft_helper.py,
lora_weights.py, config/lora.py and models/nemotron_h.py as of November 2026).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.export.adapters.opened import Opened
from nemotune.export.adapters.same_scale import same_scale
from nemotune.export.safetensors_files import weight_files
from nemotune.export.stream import Ends, Plan, in_threads
from nemotune.lora.adapter import CONFIG, WEIGHTS, read_adapter
from nemotune.lora.forms import Entry, Form, entries
from nemotune.lora.layers import scale
from nemotune.lora.pairs import Adapter
from nemotune.lora.peft_config import peft_config
from nemotune.lora.targets import adaptable_modules
from nemotune.models.base import CausalLM
from nemotune.models.saving import copy_side_files
from nemotune.weights import TensorInfo, WritePlan

NOT_FOR_VLLM = {
    "embeddings": "is adapted, which vLLM does not read for this family",
    "head": "is adapted, which vLLM does not read for this family",
    "latent": "is adapted, and vLLM hands it to its fused experts, past its adapter",
}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be


def plan_for_peft(opened: Opened) -> Plan[int]:
    """What PEFT on transformers 5 loads. The report of each plan here is the number of tensors that were read back."""
    return _plan(opened, opened.adapter, "fused")


def plan_for_vllm(opened: Opened) -> Plan[int]:
    """What vLLM serves. Raises UnsupportedError for what it cannot."""
    adapter, kinds = same_scale(opened.adapter), adaptable_modules(opened.model)
    found = {kind: [name for name in adapter.settings if kinds[name] == kind] for kind in NOT_FOR_VLLM}
    problems = [f"lora.targets: {names[0]} (one of {len(names)}) {NOT_FOR_VLLM[kind]}" for kind, names in found.items() if names]
    if adapter.magnitudes:
        problems.append(f"lora.dora: {len(adapter.magnitudes)} modules have DoRA's magnitudes, which vLLM does not read")
    if adapter.lora.rank > VLLM_RANKS[-1]:
        problems.append(f"lora.rank: got {adapter.lora.rank}, and vLLM serves ranks up to {VLLM_RANKS[-1]}")
    if problems:
        raise UnsupportedError("\n".join([*problems, "Merge the adapter (`nemotune merge`) and serve the merged model"]))
    return _plan(opened, adapter, "per_expert")


def vllm_max_rank(adapter: Adapter) -> int:
    """The value of --max-lora-rank to serve it with."""
    return next(rank for rank in VLLM_RANKS if rank >= max(its.rank for its in adapter.settings.values()))


def _plan(opened: Opened, adapter: Adapter, form: Form) -> Plan[int]:
    model, placed = opened.model, _placed(adapter, opened.model, form)
    weights = WritePlan(tuple(TensorInfo(key, WEIGHTS, adapter.dtype, entry.shape) for key, (_, entry) in placed.items()))
    dtype = weights.tensors[0].torch_dtype

    def pieces(key: str) -> Sequence[Callable[[], Tensor]]:
        name, entry = placed[key]
        return [lambda: entry.of(_tensor(adapter, name, entry.which)).to(dtype)]

    def finish(directory: Path, ends: Ends) -> None:
        copy_side_files(opened.side_files, directory)  # tokenizer and template that it was trained with
        config = peft_config(adapter.lora, adapter.settings, model, form, base=opened.base)
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def verify(directory: Path) -> int:
        _verify(directory, adapter, model)
        return len(placed)

    return Plan({"format": form, **opened.identity}, weight_files(weights, pieces), verify=verify, finish=finish)


def _placed(adapter: Adapter, model: CausalLM, form: Form) -> dict[str, tuple[str, Entry]]:
    """The module and entry of every tensor, by its key."""
    return {
        entry.keys[0]: (name, entry)
        for name, its in adapter.settings.items()
        for unit in entries(name, model, form, rank=its.rank, dora=name in adapter.magnitudes, adapted=adapter.settings)
        for entry in unit
    }


def _tensor(adapter: Adapter, name: str, which: str) -> Tensor:
    if which == "lora_magnitude_vector":
        return adapter.magnitudes[name]
    A, B = adapter.pairs[name]
    if which.startswith("lora_embedding"):
        return B.T if which == "lora_embedding_A" else A.T
    return A if which == "lora_A" else B


def _verify(directory: Path, adapter: Adapter, model: CausalLM) -> None:
    """Read the adapter in `directory` back and compare every value, rank and scale. Raises CheckpointError where one differs."""
    written = read_adapter(directory, model)
    names = sorted(adapter.settings.keys() | written.settings.keys())
    wrong = [name for name, same in zip(names, in_threads(lambda name: _is_same(name, written, adapter), names), strict=True) if not same]
    if wrong:
        raise CheckpointError(
            f"{directory}: {len(wrong)} of {len(adapter.settings)} modules read back are not what was to be written, first {wrong[0]}; "
            "nothing was kept. Export again; if it repeats, disk or memory is at fault"
        )


def _is_same(name: str, one: Adapter, other: Adapter) -> bool:
    if not (name in one.settings and name in other.settings) or (name in one.magnitudes) != (name in other.magnitudes):
        return False
    settings = [(its.rank, scale(its)) for its in (one.settings[name], other.settings[name])]
    both = [*zip(one.pairs[name], other.pairs[name], strict=True)]
    both += [(one.magnitudes[name], other.magnitudes[name])] if name in one.magnitudes else []
    return settings[0] == settings[1] and all(torch.equal(a.float(), b.float()) for a, b in both)
