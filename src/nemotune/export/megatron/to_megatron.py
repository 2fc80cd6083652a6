"""A Hugging Face directory to a checkpoint that Megatron-Bridge 0.3 and 0.7 load: planned from headers, written by `stream.py`.

Values are the directory's own, bit for bit, in its dtypes; only the router's bias becomes fp32, as Megatron holds it. Read back before
the checkpoint takes its name: every tensor of a sample, or every one, is mapped the other way and compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.export.megatron.checkpoint import finite, open_megatron
from nemotune.export.megatron.dcp_files import ChunkToWrite, DcpFiles, saved
from nemotune.export.megatron.fitting import Compared, Fitted, canonical, compared, fit, made_of, refuse, rows_between, same_bytes, slabs
from nemotune.export.megatron.homes import EXPERT_BIAS, extra_states, homes, mtp_depth
from nemotune.export.megatron.rows import Rows
from nemotune.export.megatron.side_files import write_side_files
from nemotune.export.stream import Ends, Plan
from nemotune.export.tuned import Tuned
from nemotune.models.config import NemotronHConfig
from nemotune.models.disk_names import has_copied_head, name_on_disk
from nemotune.weights.mapping import Piece

ITERATION = "iter_0000000"
NOTHING = saved([torch.empty(0, dtype=torch.uint8)])  # what an `_extra_state` entry holds


def plan_import(tuned: Tuned, *, verify_all: bool = False) -> Plan[Compared]:
    """What is written for the model of `tuned` (no adapter on it). Raises CheckpointError and UnsupportedError for what has no place."""
    assert tuned.adapter is None, "an adapter has a checkpoint of its own: lora.py"
    fitted = _fitted(tuned)
    files = DcpFiles.of(
        ITERATION,
        (chunk for each in fitted for chunk in _chunks(each, tuned)),
        ((name, NOTHING) for name in extra_states(each.home for each in fitted)),
    )

    def finish(directory: Path, ends: Ends) -> None:
        files.write_metadata(directory, ends)
        depth = mtp_depth(map(partial(canonical, model=tuned.model), tuned.infos), tuned.model.config)
        write_side_files(directory, ITERATION, config=tuned.model.config, beside=tuned.directory, mtp_depth=depth)

    identity = {"format": "megatron", **tuned.identity}
    return Plan(identity, files.output_files(), lambda directory: _verify(directory, tuned, fitted, all_=verify_all), finish)


def _fitted(tuned: Tuned) -> list[Fitted]:
    """The homes that the model has, sized. Every tensor of the directory is in one, or it is refused by name."""
    config = tuned.model.config
    if isinstance(config, NemotronHConfig) and "mamba" in config.block_types and not config.use_conv_bias:
        raise UnsupportedError(f"{tuned.directory}: use_conv_bias: false: Megatron's Mamba layers always have that bias")
    names = {canonical(name, tuned.model): name for name in tuned.infos}
    fitted, problems = [], []
    for home in homes(config, mtp_depth=mtp_depth(names, config)):
        if not home.names & names.keys():
            continue  # this model has no latent projections, for example
        try:
            fitted.append(fit(home, lambda name: tuned.infos[names[name]].shape))
        except (ValueError, KeyError) as error:
            problems.append(f"{home.name}: no {error.args[0]}" if isinstance(error, KeyError) else str(error))
    used = {name for each in fitted for name in each.home.names}
    left_out = {"lm_head.weight"} if has_copied_head(tuned.model) else set()
    problems += [
        f"{name}: has no place in Megatron's model" for name in names if name not in used | left_out and not name.endswith("inv_freq")
    ]
    problems += [f"{each.name}: is made of {sorted(kinds)}" for each in fitted if len(kinds := _dtypes(each, tuned)) > 1]
    problems += made_of(fitted)[1]
    refuse(tuned.directory, problems, "Megatron-Bridge cannot hold this model: its Nemotron and Llama have no biases but the convolution's")
    return fitted


def _dtypes(each: Fitted, tuned: Tuned) -> set[str]:
    return {tuned.infos[name_on_disk(Piece(name), tuned.model)].dtype for name in each.home.names}


def _dtype(each: Fitted, tuned: Tuned) -> torch.dtype:
    if each.name.endswith(EXPERT_BIAS):
        return torch.float32
    return tuned.infos[name_on_disk(Piece(min(each.home.names)), tuned.model)].torch_dtype


def _chunks(each: Fitted, tuned: Tuned) -> Iterator[ChunkToWrite]:
    shape, dtype = each.shape, _dtype(each, tuned)
    for i, runs in enumerate(each.home.entries):
        lead = (i,) if each.home.stacked else ()
        for start, stop in slabs(each.num_rows, each.tail):
            sizes = (*(1 for _ in lead), stop - start, *each.tail)
            make = partial(_made, tuned, runs, start, stop, sizes, dtype)
            yield ChunkToWrite(each.name, shape, dtype, (*lead, start, *(0 for _ in each.tail)), sizes, make)


def _made(tuned: Tuned, runs: tuple[Rows, ...], start: int, stop: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return rows_between(runs, start, stop, partial(_read, tuned)).to(dtype).reshape(sizes)


def _read(tuned: Tuned, run: Rows) -> Tensor:
    name = name_on_disk(Piece(run.name), tuned.model)
    return finite(tuned.base.read_rows(name, run.first, run.first + run.length), f"{tuned.directory}: {name}")


def _verify(directory: Path, tuned: Tuned, fitted: list[Fitted], *, all_: bool) -> Compared:
    """Hugging Face tensors made of what was written, against the directory's own."""
    written = open_megatron(directory)
    planned = {each.name: each.shape for each in fitted}
    if {name: tensor.shape for name, tensor in written.stored.tensors.items()} != planned:
        raise CheckpointError(f"{directory}: names and shapes as written are not those planned; nothing was kept. Convert again")
    sources, _ = made_of(fitted)

    def is_right(part: tuple[str, int, int]) -> bool:
        name, start, stop = part
        own = _read(tuned, Rows(name, start, stop - start))
        return same_bytes(rows_between(sources[name], start, stop, written.rows).to(own.dtype), own)

    shapes = {name: tuned.infos[name_on_disk(Piece(name), tuned.model)].shape for name in sources}
    parts = [(name, start, stop) for name, shape in shapes.items() for start, stop in slabs(shape[0], shape[1:])]
    return compared(parts, is_right, directory, of="the source", all_=all_)
