"""Adapters on disk: `adapter_config.json` and `adapter_model.safetensors`, named as PEFT names them (`peft_form.py`).

A of experts is flattened as (expert, rank) x in, B as out x (rank, expert); those of embeddings are transposed. Every tensor is
counted on writing and reading: a module that the config names and the file lacks is an error, and so is a tensor of a module that it
does not name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nemotune.errors import CheckpointError, MissingFileError
from nemotune.files import staged_directory
from nemotune.lora.dropout import DropoutKeys
from nemotune.lora.layers import LoRAEmbedding, lora_modules, scale
from nemotune.lora.peft_form import SUFFIXES, named_modules, peft_config, peft_keys, read_peft_config, spellings, unplaced_parameters
from nemotune.lora.targets import adaptable_modules, apply_lora, module_settings, refuse_shared_embeddings
from nemotune.models.base import CausalLM
from nemotune.models.disk_names import disk_pieces
from nemotune.recipe import Lora
from nemotune.weights import Checkpoint, TensorInfo, WritePlan, write_checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COPY = ".base_layer.weight"  # of embeddings and a head that are adapted: PEFT keeps the base's beside the adapter
PAIRS_IN_MEMORY = 4  # the experts of one module are asked for one after the other, and its two modules in turn
ROWS_AT_ONCE = 4096
OUT_PROJ_NOTE = "PEFT refuses Mamba's out_proj, which this adapter has: it loads in nemotune and merges"


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk, by the name of the adapted module: A [..., rank, in] and B [..., out, rank], DoRA's magnitudes, what holds for it.

    A pair is read when it is asked for. Embeddings are read as the linear layer of their weight [vocabulary, hidden]: their update is `B A` too.
    """

    lora: Lora
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    magnitudes: dict[str, Tensor]
    settings: dict[str, Lora]

    def delta(self, module: str, expert: int | None = None, rows: slice = slice(None)) -> Tensor:
        """What is added to (those rows of) a module's weight, or of one expert's, fp32."""
        A, B = self.pairs[module] if expert is None else (t[expert] for t in self.pairs[module])
        return (B[rows].float() @ A.float()).mul_(scale(self.settings[module]))

    def updated(self, weight: Tensor, module: str, expert: int | None = None, *, start: int = 0) -> Tensor:
        """The weight (or that of one expert) as the adapter makes it, fp32; given are its rows from `start` on. DoRA's rows are measured in fp64."""
        rows = slice(start, start + len(weight))
        updated = weight.float() + self.delta(module, expert, rows)
        if module not in self.magnitudes:
            return updated
        return updated * gains(self.magnitudes[module][rows], updated).float()


class _Pairs(Mapping[str, tuple[Tensor, Tensor]]):
    """Pairs that are read when they are asked for; the last few are kept."""

    def __init__(self, readers: Mapping[str, Callable[[], tuple[Tensor, Tensor]]]):
        self._readers = readers
        self._read = lru_cache(PAIRS_IN_MEMORY)(lambda name: readers[name]())

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def gains(magnitude: Tensor, updated: Tensor) -> Tensor:
    """What DoRA multiplies the rows of the updated weight by, fp64 [out, 1]; a row of zeros stays one."""
    norms = torch.linalg.vector_norm(updated, dim=1, dtype=torch.float64).clamp(min=torch.finfo(torch.float32).tiny)
    return (magnitude.double() / norms).unsqueeze(1)


def save_adapter(
    model: CausalLM, directory: Path, lora: Lora, *, base: str, overwrite: bool = False, values: Callable[[str], Tensor] | None = None
) -> list[str]:
    """Write the adapter of `model` into `directory`. Returns notes on where it will not load.

    `values` gives a parameter by its name in the model; where it is given the model's own may be empty.
    """
    layers = dict(lora_modules(model))
    named = {name: kind for name, kind in adaptable_modules(model).items() if name in layers}
    names: dict[str, str] = {}
    for name, layer in layers.items():
        key = peft_keys(name, named, model)[0]
        names |= {key + SUFFIXES[which]: f"{name}.{which}" for which, _ in layer.named_parameters(recurse=False)}
    assert len(names) == (3 if lora.dora else 2) * len(layers), "two modules of one name"
    shapes = {key: _flat(name, model.get_parameter(name).to("meta")).shape for key, name in names.items()}
    plan = WritePlan(tuple(TensorInfo(key, WEIGHTS, "F32", tuple(shape)) for key, shape in shapes.items()))
    read = values or model.get_parameter
    with staged_directory(directory, overwrite=overwrite, needed_bytes=plan.num_bytes) as aside:
        write_checkpoint(aside, plan, lambda info: _flat(names[info.name], read(names[info.name])))
        (aside / CONFIG).write_text(json.dumps(peft_config(named, lora, model, base=base), indent=2) + "\n", encoding="utf-8")
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
    named = named_modules(config, model)
    refuse_shared_embeddings(named, model)
    readers, magnitudes, problems = {}, {}, [f"target_parameters: '{name}' are no experts" for name in unplaced_parameters(config, model)]
    for name in named:
        module, keys = model.get_submodule(name), peft_keys(name, named, model)
        expected = _flat_shapes(module, config.rank_of(spellings(name, model)), dora=config.use_dora)
        found = {which: _take(left, [key + SUFFIXES[which] for key in keys]) for which in expected}
        got = {which: info.shape for which, info in found.items() if info is not None}
        if missing := expected.keys() - got.keys():
            problems.append(f"{name}: {CONFIG} names it, {WEIGHTS} has no {min(missing)} of it")
        elif got != expected:
            parts = "A, B and magnitude" if config.use_dora else "A and B"
            problems.append(f"{name}: got {parts} of {tuple(got.values())}, expected {tuple(expected.values())}")
        else:
            A, B, *magnitude = (info.name for info in found.values() if info)
            readers[name] = partial(_read_pair, source, A, B, module)
            if magnitude:
                magnitudes[name] = source.read(*magnitude)
        copied = _take(left, [key + COPY for key in keys])
        if copied is not None and not _is_of_the_base(source.read(copied.name), name, model):
            problems.append(f"{name}: {WEIGHTS} has a weight of it that is not the base's")
    problems += [f"{key}: no module that {CONFIG} names has this tensor" for key in left]
    if problems or not readers:
        listed = "\n  ".join(problems[:8] or [f"{CONFIG} names no module of it"])
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{directory}: does not fit {model.family}:\n  {listed}{more}\nCheck that adapter and base belong together")
    lora = config.lora({name: spellings(name, model) for name in named})
    return Adapter(lora, _Pairs(readers), magnitudes, module_settings(named, lora))


def open_tensors(directory: Path) -> Checkpoint:
    """The tensors of the adapter in `directory`, every value of them finite. Raises CheckpointError."""
    source = Checkpoint(directory, files=(WEIGHTS,))
    bad = [name for name in source.tensors if not all(rows.isfinite().all() for rows in source.slices(name, ROWS_AT_ONCE))]
    if bad:
        raise CheckpointError(
            f"{directory / WEIGHTS}: {len(bad)} of {len(source.tensors)} tensors hold values that are not finite, first {bad[0]}; "
            "copy the adapter again, or train it with a lower train.learning_rate"
        )
    return source


def _read_pair(source: Checkpoint, A: str, B: str, module: nn.Module) -> tuple[Tensor, Tensor]:
    return _unflattened(source.read(A), source.read(B), module)


def _take(left: dict[str, TensorInfo], keys: list[str]) -> TensorInfo | None:
    return next((left.pop(key) for key in keys if key in left), None)


def _is_of_the_base(copied: Tensor, name: str, model: CausalLM) -> bool:
    """Whether `copied` is what the base has on disk for the weight of module `name`, in the dtype that PEFT loaded it in."""
    weight = getattr(model.get_submodule(name), "weight", None)
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight}  # a tied head has two
    for disk_name, (held, _) in disk_pieces(model):
        if held in names and model.source is not None:
            return torch.equal(copied, model.source.read(disk_name).to(copied.dtype))
    return False


def _flat(name: str, tensor: Tensor) -> Tensor:
    """A of experts as (expert, rank) x in, B as out x (rank, expert); any other as it is."""
    if tensor.ndim < 3:
        return tensor
    return tensor.flatten(0, 1) if name.endswith(".lora_A") else tensor.permute(1, 2, 0).flatten(1)


def _flat_shapes(module: nn.Module, rank: int, *, dora: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's tensors on disk, A first."""
    rows = rank * getattr(module, "num_experts", 1)
    if isinstance(module, nn.Embedding):
        width, shapes = (
            module.embedding_dim,
            {"lora_embedding_A": (rank, module.num_embeddings), "lora_embedding_B": (module.embedding_dim, rank)},
        )
    else:
        width, shapes = module.out_features, {"lora_A": (rows, module.in_features), "lora_B": (module.out_features, rows)}
    return {**shapes, "lora_magnitude_vector": (width,)} if dora else shapes


def _unflattened(A: Tensor, B: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    if isinstance(module, nn.Embedding):
        return B.T, A.T
    experts = getattr(module, "num_experts", None)
    return (A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)) if experts else (A, B)
