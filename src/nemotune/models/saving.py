"""From modules to a Hugging Face directory, tensor by tensor; the way back is in `loading.py`.

What was loaded is written under the same names, in the same shapes, dtypes and shards and, untrained, with the same bytes; what no
forward here uses (`mtp.*`) is copied from its file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nemotune.files import staged_directory, write_json
from nemotune.models.base import CausalLM
from nemotune.models.disk_names import disk_pieces, tensors_of
from nemotune.models.quantize import is_quantized
from nemotune.weights import TensorInfo, WritePlan, write_checkpoint
from nemotune.weights.dtypes import NAMES

SIDE_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "LICENSE*", "NOTICE*")


def save_model(
    model: CausalLM, directory: str | Path, *, overwrite: bool = False, values: Callable[[str, int | None], Tensor] | None = None
) -> None:
    """Write the model as a Hugging Face directory: the source's names, dtypes, shards and side files, the model's values.

    `values` gives a tensor by its name in the model, or its entry along dim 0; where it is given the model's own may be empty.
    """
    assert not is_quantized(model), "a quantised model is never saved: merge its adapter onto the wide base"
    directory = Path(directory)
    pieces = dict(disk_pieces(model))
    plan = _write_plan(model, pieces)
    state = tensors_of(model)

    def read(info: TensorInfo) -> Tensor:
        if info.name not in pieces:
            assert model.source is not None
            return model.source.read(info.name)
        name, index = pieces[info.name]
        if values is not None:
            return values(name, index)
        return state[name] if index is None else state[name][index]

    with staged_directory(directory, overwrite=overwrite, needed_bytes=plan.num_bytes) as aside:
        write_checkpoint(aside, plan, read)
        if model.directory is not None:
            copy_side_files(model.directory, aside)
        write_json(aside / "config.json", model.config.raw)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights: config, tokenizer, template, generation settings, licence."""
    for pattern in SIDE_FILES:
        for file in sorted(source.glob(pattern)):
            if not file.name.endswith(".safetensors.index.json"):
                shutil.copyfile(file, target / file.name)


def _write_plan(model: CausalLM, pieces: dict[str, tuple[str, int | None]]) -> WritePlan:
    """The source's own tensors where there is one, else every tensor in the checkpoint's dtype."""
    if model.source is not None:
        return WritePlan(tuple(model.source.tensors.values()))
    dtype = NAMES[getattr(torch, model.config.dtype)]
    rows, state = [], tensors_of(model)
    for disk_name, (name, index) in pieces.items():
        shape = tuple(state[name].shape)[0 if index is None else 1 :]
        rows.append((disk_name, "F32" if model.stays_fp32(name) else dtype, shape))
    return WritePlan.in_shards(rows)
