"""From a directory of safetensors to modules, tensor by tensor; the way back is in `saving.py`.

Peak memory is the model plus one tensor. Every tensor on disk has a home in the model or is kept by reference to its file
(`mtp.*`, which no forward here uses).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.models.base import CausalLM
from nemotune.models.config import LlamaConfig, NemotronHConfig
from nemotune.models.config_json import read_config
from nemotune.models.disk_names import HEAD, disk_pieces, embeddings_name, has_copied_head, name_on_disk, tensors_of
from nemotune.models.initialize import draw
from nemotune.models.llama import Llama
from nemotune.models.locate import locate
from nemotune.models.nemotron_h import NemotronH
from nemotune.models.offload import expert_weights, offload_experts
from nemotune.models.quantize import quantize_modules
from nemotune.weights import Checkpoint, Layout
from nemotune.weights.mapping import Piece, pieces_of

FAMILIES: dict[type, type[CausalLM]] = {NemotronHConfig: NemotronH, LlamaConfig: Llama}
UNUSED_PREFIXES = ("mtp.",)  # multi-token prediction: kept on disk, never computed
TRAINABLE = {"BF16", "F16", "F32", "F64"}  # dtypes on disk; any other is that of quantised weights

Dtype = Literal["bfloat16", "float32"]
Quantization = Literal["none", "nf4"]
Offload = Literal["none", "experts"]


def build_model(config: NemotronHConfig | LlamaConfig) -> CausalLM:
    """The family's model with parameters on the meta device: shapes without memory."""
    with torch.device("meta"):
        model = FAMILIES[type(config)](config)
    if config.tie_word_embeddings:
        model.tie_head()
    return model


def load_model(
    path: str | Path,
    *,
    dtype: Dtype = "bfloat16",
    revision: str | None = None,
    device: str = "cpu",
    quantization: Quantization = "none",
    offload: Offload = "none",
    trainable: bool = False,
    random_seed: int | None = None,
    arrange: Callable[[CausalLM], None] | None = None,
    ready: Callable[[nn.Module], None] | None = None,
) -> CausalLM:
    """The model at `path` (directory, hub id or built-in name), computing in `dtype`.

    It is in evaluation mode. Weights are held in `dtype`, in fp32 where the family asks for it and everywhere if `trainable`; with
    `quantization` nf4 the linear layers and experts are quantised as they are read (quantize.py). With `random_seed` the weights are
    drawn instead, and the directory needs no shards. With `offload` experts lie on the host and are lent to `device` (offload.py).
    `arrange` may shrink the empty model to what one of several processes holds: no more than that is kept. `ready` is called with each
    block as soon as its weights are there.
    Raises MissingFileError, CheckpointError, and RecipeError for an offload of experts that are not there.
    """
    assert quantization == "none" or not (trainable or random_seed is not None), "NF4 is for frozen weights that were read"
    assert offload == "none" or not trainable, "what is lent is frozen"
    directory = locate(path, revision, weights=random_seed is None)
    config = read_config(directory)
    model = build_model(config)
    model.directory, model.compute_dtype = directory, getattr(torch, dtype)
    held_dtype = torch.float32 if trainable else model.compute_dtype
    if random_seed is None:
        model.source = Checkpoint(directory)
        check_weights(model, model.source)
    if arrange is not None:
        arrange(model)
    wanted = tensors_of(model)
    on_host = expert_weights(model) if offload == "experts" else set()
    quantized = quantize_modules(model, device=device, experts_device="cpu" if on_host else None) if quantization == "nf4" else {}
    for block, names in groupby(wanted, key=_block_of):
        for name in names:
            values = _stored(name, wanted[name], model) if random_seed is None else _drawn(name, wanted[name], model, random_seed)
            if name in quantized:
                for index, value in values:
                    quantized[name].fill(value.to(device), index)
                continue
            where = "cpu" if name in on_host else device
            tensor = torch.empty(wanted[name].shape, dtype=torch.float32 if model.stays_fp32(name) else held_dtype, device=where)
            for index, value in values:
                (tensor if index is None else tensor[index]).copy_(value)
            _assign(model, name, tensor)
        if ready is not None and block:
            model.requires_grad_(trainable)
            ready(model.get_submodule(block))
    if config.tie_word_embeddings:
        model.tie_head()
    if on_host:
        offload_experts(model, device)
    return model.requires_grad_(trainable).eval()


def check_weights(model: CausalLM, source: Checkpoint) -> None:
    """Every tensor that the model needs is there in its shape, every tensor that is there is needed or known to be unused, a tied head is a copy.

    Raises CheckpointError with everything that does not fit, UnsupportedError where it is quantised.
    """
    _refuse_quantised(model, source)
    problems, used, state = [], set(), tensors_of(model)
    for disk_name, (name, index) in disk_pieces(model):
        expected = tuple(state[name].shape)[0 if index is None else 1 :]
        used.add(disk_name)
        if disk_name not in source:
            problems.append(f"{disk_name}: missing, expected shape {expected}")
        elif (got := source.tensors[disk_name].shape) != expected:
            problems.append(f"{disk_name}: got shape {got}, expected {expected}")
    problems += [f"{name}: has no place in the model" for name in source.tensors if name not in used and not _is_unused(name)]
    if problems:
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        listed = "\n  ".join(problems[:8])
        raise CheckpointError(
            f"{source.directory}: {len(problems)} tensors do not fit config.json:\n  {listed}{more}\nCheck that config and weights belong to one model"
        )
    if has_copied_head(model):
        _check_copied_head(model, source)


def _refuse_quantised(model: CausalLM, source: Checkpoint) -> None:
    """Told first: the scales beside quantised weights have no place in the model either."""
    stored = {source.tensors[name].dtype for name, _ in disk_pieces(model) if name in source}
    if coarse := sorted(stored - TRAINABLE):
        raise UnsupportedError(
            f"{source.directory}: stored as {', '.join(coarse)}: quantised checkpoints cannot be tuned, use the BF16 release"
        )


def _is_unused(name: str) -> bool:
    return name.startswith(UNUSED_PREFIXES) or name.endswith("rotary_emb.inv_freq")


def _check_copied_head(model: CausalLM, source: Checkpoint) -> None:
    embeddings = name_on_disk(Piece(embeddings_name(model)), model)
    head, copied = source.read(HEAD), source.read(embeddings)
    if head.dtype != copied.dtype or not torch.equal(head.view(torch.uint8), copied.view(torch.uint8)):
        raise CheckpointError(
            f"{source.directory}: config.json has tie_word_embeddings: true, but {HEAD} and {embeddings} differ; "
            f"set it to false if the head is one of its own, else delete {HEAD} from the weights"
        )


def _stored(name: str, tensor: Tensor, model: CausalLM) -> Iterator[tuple[int | None, Tensor]]:
    """What `tensor`, called `name`, consists of, one tensor on disk at a time: its place along dim 0, or None where it is all of it."""
    assert model.source is not None
    layout = model.layout(name, tensor)
    for piece in pieces_of(name, layout.shape, model.stacks):
        if piece.index is None:
            yield None, _read(model.source, name_on_disk(piece, model), layout)
        elif (place := layout.place_of(piece.index)) is not None:
            yield place, _read(model.source, name_on_disk(piece, model), layout.of_row())


def _read(source: Checkpoint, name: str, layout: Layout) -> Tensor:
    """That part of a tensor on disk; of its rows only those are read."""
    if layout.is_whole:
        return source.read(name)
    rows = torch.cat([source.read_rows(name, start, stop) for start, stop in layout.ranges[0]])
    return Layout(tuple(rows.shape), (((0, len(rows)),), *layout.ranges[1:])).take(rows)


def _drawn(name: str, tensor: Tensor, model: CausalLM, seed: int) -> Iterator[tuple[None, Tensor]]:
    """A fresh `tensor`, called `name`: its part of what the whole one would be."""
    layout = model.layout(name, tensor)
    yield None, layout.take(draw(name, layout.shape, model, seed=seed))


def _block_of(name: str) -> str:
    """The block that the tensor belongs to, or nothing."""
    match = re.match(r".+?\.layers\.\d+(?=\.)", name)
    return match[0] if match else ""


def _assign(model: CausalLM, name: str, tensor: Tensor) -> None:
    owner_name, _, last = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if last in owner._buffers:
        owner._buffers[last] = tensor
    else:
        setattr(owner, last, nn.Parameter(tensor, requires_grad=False))
