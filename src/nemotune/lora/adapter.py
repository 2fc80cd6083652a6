"""Adapters on disk: `adapter_config.json` (`peft_config.py`) and `adapter_model.safetensors`, in either form of `forms.py`; what is saved is PEFT's.

Every tensor is counted on writing and reading: a module that the config names and the file lacks is an error, and so is a tensor of a
module that it does not name. An expert that the config leaves out, where it names others of its layer, is not adapted: its update is zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nemotune.errors import CheckpointError, MissingFileError
from nemotune.files import staged_directory
from nemotune.lora.dropout import DropoutKeys
from nemotune.lora.forms import SUFFIXES, Entry, Form, entries, form_of, plain, restored, spellings
from nemotune.lora.layers import LoRAEmbedding, lora_modules
from nemotune.lora.pairs import Adapter, Pairs
from nemotune.lora.peft_config import named_units, peft_config, read_peft_config, unplaced_parameters
from nemotune.lora.targets import adaptable_modules, apply_lora, module_settings, refuse_shared_embeddings
from nemotune.models.base import CausalLM
from nemotune.models.disk_names import disk_pieces
from nemotune.recipe import Lora
from nemotune.weights import Checkpoint, TensorInfo, WritePlan, is_finite, write_checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COPY = ".base_layer.weight"  # of embeddings and a head that are adapted: PEFT keeps the base's beside the adapter
ROWS_AT_ONCE = 4096
OUT_PROJ_NOTE = "PEFT refuses Mamba's out_proj, which this adapter has: it loads in nemotune and merges"


def save_adapter(
    model: CausalLM, directory: Path, lora: Lora, *, base: str, overwrite: bool = False, values: Callable[[str], Tensor] | None = None
) -> list[str]:
    """Write the adapter of `model` into `directory`. Returns notes on where it will not load.

    `values` gives a parameter by its name in the model; where it is given the model's own may be empty.
    """
    layers = dict(lora_modules(model))
    settings = module_settings({name: kind for name, kind in adaptable_modules(model).items() if name in layers}, lora)
    placed = {
        entry.keys[0]: (entry, f"{name}.{entry.which}")
        for name, its in settings.items()
        for unit in entries(name, model, "fused", rank=its.rank, dora=lora.dora, adapted=settings)
        for entry in unit
    }
    assert len(placed) == (3 if lora.dora else 2) * len(layers), "two modules of one name"
    plan = WritePlan(tuple(TensorInfo(key, WEIGHTS, "F32", entry.shape) for key, (entry, _) in placed.items()))
    read = values or model.get_parameter
    with staged_directory(directory, overwrite=overwrite, needed_bytes=plan.num_bytes) as aside:
        write_checkpoint(aside, plan, lambda info: placed[info.name][0].of(read(placed[info.name][1])))
        (aside / CONFIG).write_text(json.dumps(peft_config(lora, settings, model, "fused", base=base), indent=2) + "\n", encoding="utf-8")
    return [OUT_PROJ_NOTE] if any(name.endswith(".out_proj") for name in layers) else []


def load_adapter(model: CausalLM, directory: Path) -> DropoutKeys:
    """Adapt `model` as the adapter in `directory` says and fill in its values. Raises CheckpointError for keys that do not fit."""
    adapter = read_adapter(directory, model)
    keys = apply_lora(model, adapter.lora)
    for name, layer in lora_modules(model):
        A, B = adapter.pairs[name]
        values = [B.T, A.T] if isinstance(layer, LoRAEmbedding) else [A, B]
        values += [adapter.magnitudes[name]] if name in adapter.magnitudes else []
        for parameter, value in zip(layer.parameters(recurse=False), values, strict=True):
            with torch.no_grad():
                parameter.copy_(value)
    return keys


def read_adapter(directory: Path, model: CausalLM) -> Adapter:
    """The adapter in `directory`, its tensors checked against its config and `model` (which may be on the meta device and stays as it is).

    Raises CheckpointError, MissingFileError, UnsupportedError.
    """
    directory = Path(directory)
    for file in (CONFIG, WEIGHTS):
        if not (directory / file).is_file():
            raise MissingFileError(f"{directory / file}: no such file; expected an adapter directory as PEFT writes it")
    config, source = read_peft_config(directory / CONFIG), open_tensors(directory)
    left = dict(source.tensors)
    form = form_of(left) or "fused"
    named = named_units(config, model, form)
    refuse_shared_embeddings(named, model)
    readers, magnitudes, settings = {}, {}, {}
    problems = [f"target_parameters: '{name}' are no experts" for name in unplaced_parameters(config, model)]
    for name, its_units in named.items():
        several = {config.rank_and_alpha(spellings(unit, model)) for unit in its_units if unit}
        settings[name] = rank, _ = max(several)
        if len(several) > 1:
            problems.append(f"{name}: its experts have ranks and alphas of {sorted(several)}, expected one for all")
            continue
        expected = entries(name, model, form, rank=rank, dora=config.use_dora, adapted=named)
        found = [[_take(left, entry) for entry in unit] if named_as else None for named_as, unit in zip(its_units, expected, strict=True)]
        problems += [text for unit in zip(its_units, expected, found, strict=True) if (text := _wrong(*unit))]
        readers[name] = partial(_read_pair, source, name, model, form, expected[0], found)
        if config.use_dora and found[0] and found[0][-1]:
            magnitudes[name] = source.read(found[0][-1].name)
        copied = next((left.pop(key) for key in _copies(expected[0]) if key in left), None)
        if copied is not None and not _is_of_the_base(source.read(copied.name), name, model):
            problems.append(f"{name}: {WEIGHTS} has a weight of it that is not the base's")
    problems += [f"{key}: no module that {CONFIG} names has this tensor" for key in left]
    if problems or not readers:
        listed = "\n  ".join(problems[:8] or [f"{CONFIG} names no module of it"])
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{directory}: does not fit {model.family}:\n  {listed}{more}\nCheck that adapter and base belong together")
    lora, dtypes = config.lora(settings), {info.dtype for info in source.tensors.values()}
    kinds = {name: kind for name, kind in adaptable_modules(model).items() if name in named}
    return Adapter(lora, Pairs(readers), magnitudes, module_settings(kinds, lora), dtypes.pop() if len(dtypes) == 1 else "F32")


def open_tensors(directory: Path) -> Checkpoint:
    """The tensors of the adapter in `directory`, every value of them finite. Raises CheckpointError."""
    source = Checkpoint(directory, files=(WEIGHTS,))
    bad = [name for name in source.tensors if not _is_finite(source, name)]
    if bad:
        raise CheckpointError(
            f"{directory / WEIGHTS}: {len(bad)} of {len(source.tensors)} tensors hold values that are not finite, first {bad[0]}; "
            "copy the adapter again, or train it with a lower train.learning_rate"
        )
    return source


def _is_finite(source: Checkpoint, name: str) -> bool:
    if not source.tensors[name].shape:
        return True  # fits no module, which is told later
    return all(is_finite(rows) for rows in source.slices(name, ROWS_AT_ONCE))


Found = Sequence[TensorInfo | None] | None  # the tensors of a unit; None of an expert that the config leaves out


def _read_pair(
    source: Checkpoint, name: str, model: CausalLM, form: Form, expected: list[Entry], found: list[Found]
) -> tuple[Tensor, Tensor]:
    module = plain(model.get_submodule(name))
    A, B = (
        restored([source.read(unit[i].name) if unit else None for unit in found], entry.which, module, form, entry.shape)
        for i, entry in enumerate(expected[:2])
    )
    return (B.T, A.T) if expected[0].which == "lora_embedding_A" else (A, B)


def _wrong(unit: str | None, expected: list[Entry], found: Found) -> str | None:
    """What is wrong with the tensors of a unit."""
    if found is None:
        return None
    if missing := [entry.which for entry, info in zip(expected, found, strict=True) if info is None]:
        return f"{unit}: {CONFIG} names it, {WEIGHTS} has no {min(missing)} of it"
    got, shapes = tuple(info.shape for info in found if info), tuple(entry.shape for entry in expected)
    if got == shapes:
        return None
    return f"{unit}: got {'A, B and magnitude' if len(shapes) > 2 else 'A and B'} of {got}, expected {shapes}"


def _take(left: dict[str, TensorInfo], entry: Entry) -> TensorInfo | None:
    return next((left.pop(key) for key in entry.keys if key in left), None)


def _copies(expected: list[Entry]) -> list[str]:
    return [key.removesuffix(SUFFIXES[expected[0].which]) + COPY for key in expected[0].keys]


def _is_of_the_base(copied: Tensor, name: str, model: CausalLM) -> bool:
    """Whether `copied` is what the base has on disk for the weight of module `name`, in the dtype that PEFT loaded it in."""
    weight = getattr(model.get_submodule(name), "weight", None)
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight}  # a tied head has two
    for disk_name, (held, _) in disk_pieces(model):
        if held in names and model.source is not None:
            return torch.equal(copied, model.source.read(disk_name).to(copied.dtype))
    return False
