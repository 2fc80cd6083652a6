"""Base + adapter to a Hugging Face directory: what `tuned.py` gives, under the base's own names, in its dtypes and shards.

A sample of it is read back and compared with what it should be, computed anew in fp64, before the directory takes its name. How it is
written is in `stream.py`.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from nemotune.errors import CheckpointError
from nemotune.export.safetensors_files import weight_files
from nemotune.export.stream import Ends, Plan, bytes_of, in_threads, write
from nemotune.export.tuned import Tuned, open_tuned
from nemotune.lora.layers import scale
from nemotune.lora.pairs import gains
from nemotune.models.saving import copy_side_files
from nemotune.weights import Checkpoint, WritePlan
from nemotune.weights.writer import write_index

SAMPLED_TENSORS = 64  # so many updated ones, as many untouched ones
SAMPLED_ROWS, ROWS_IN_A_ROW = 64, 16  # of each updated one
SAMPLED_RUNS = 64  # of rows of each untouched one: all of it up to 16 million values
TRAINED_WITH = ("chat_template.jinja", "generation_config.json")  # the adapter's own win over the base's: it was trained with them


@dataclass(frozen=True)
class Verified:
    """How many tensors were read back and found right."""

    updated: int
    untouched: int


def merge(
    base_dir: Path, adapter_dir: Path, target: Path, *, overwrite: bool = False, done: Callable[[int], None] = lambda _: None
) -> Verified:
    """Write the merged model to `target`; `done` is told the bytes as they are written. `target` is absent, or whole and verified."""
    return write(plan_merge(open_tuned(base_dir, adapter_dir)), target, overwrite=overwrite, done=done)


def plan_merge(tuned: Tuned) -> Plan[Verified]:
    """What a merge writes."""
    weights = WritePlan(tuple(tuned.infos.values()))

    def finish(directory: Path, ends: Ends) -> None:
        write_index(directory, weights)
        copy_side_files(tuned.directory, directory)
        for name in TRAINED_WITH:
            if tuned.adapter_dir is not None and (tuned.adapter_dir / name).is_file():
                shutil.copyfile(tuned.adapter_dir / name, directory / name)

    identity = {"format": "hf", **tuned.identity}
    return Plan(identity, weight_files(weights, tuned.pieces), verify=lambda directory: verify(directory, tuned), finish=finish)


def verify(directory: Path, tuned: Tuned) -> Verified:
    """Read a sample of the tensors in `directory` back. Raises CheckpointError where one is not as it should be."""
    written = Checkpoint(directory)
    if written.tensors != tuned.infos:
        raise CheckpointError(f"{directory}: names, shapes and dtypes as written are not the base's; nothing was kept. Merge again")
    updated, untouched = _sample(tuned.updates), _sample(name for name in tuned.infos if name not in tuned.updates)
    are_right = in_threads(
        lambda name: (_is_updated if name in tuned.updates else _is_the_bases)(written, name, tuned), [*updated, *untouched]
    )
    wrong = [name for name, is_right in zip([*updated, *untouched], are_right, strict=True) if not is_right]
    if wrong:
        raise CheckpointError(
            f"{directory}: {len(wrong)} of {len(updated) + len(untouched)} tensors read back are not base + adapter, first {wrong[0]}; "
            "nothing was kept. Merge again; if it repeats, disk or memory is at fault"
        )
    return Verified(len(updated), len(untouched))


def _sample(names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    return random.Random(0).sample(ordered, min(SAMPLED_TENSORS, len(ordered)))


def _is_updated(source: Checkpoint, name: str, tuned: Tuned) -> bool:
    """Whether rows of it, as written, are base + adapter, rounded to its dtype once."""
    assert tuned.adapter is not None
    module, expert = tuned.updates[name]
    num_rows = tuned.infos[name].shape[0]
    ranges = [(start, min(start + ROWS_IN_A_ROW, num_rows)) for start in range(0, num_rows, ROWS_IN_A_ROW)]
    ranges = ranges[:: max(1, num_rows // SAMPLED_ROWS)]
    rows = torch.cat([torch.arange(*some) for some in ranges])
    written, base = (torch.cat([checkpoint.read_rows(name, *some) for some in ranges]) for checkpoint in (source, tuned.base))
    A, B = tuned.adapter.pairs[module] if expert is None else (t[expert] for t in tuned.adapter.pairs[module])
    A, B = A.double(), B[rows].double()
    its = tuned.adapter.settings[module]
    exact = base.double() + scale(its) * (B @ A)
    summed = base.double().abs() + scale(its) * (B.abs() @ A.abs())
    kind, eps = torch.finfo(written.dtype), torch.finfo(torch.float32).eps
    lost = (4 + its.rank) * eps * summed  # by fp32 sums of rank terms
    if module in tuned.adapter.magnitudes:
        gain = gains(tuned.adapter.magnitudes[module][rows], exact)
        loss_of_gain = 2 * eps + lost.norm(dim=1, keepdim=True) / exact.norm(dim=1, keepdim=True).clamp(min=kind.tiny)
        exact, lost = gain * exact, gain.abs() * (lost + loss_of_gain * exact.abs())
    # half a unit in the last place of the dtype, and what was lost before it
    allowed = 0.501 * kind.eps * exact.abs().clamp(min=kind.tiny) + lost
    return bool(((written.double() - exact).abs() <= allowed).all())


def _is_the_bases(source: Checkpoint, name: str, tuned: Tuned) -> bool:
    """Whether its bytes are; of a large tensor, those of some runs of rows from the first to the last."""
    if not tuned.infos[name].shape or not tuned.infos[name].num_bytes:
        return bytes_of(source.read(name)) == bytes_of(tuned.base.read(name))
    ranges = tuned.row_ranges(name)
    some = [*ranges[:: -(-len(ranges) // SAMPLED_RUNS)], *ranges[-1:]]
    pairs = ((checkpoint.read_rows(name, *rows) for checkpoint in (source, tuned.base)) for rows in some)
    return all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in pairs)
