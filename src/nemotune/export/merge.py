"""Base + adapter -> Hugging Face directory, shard by shard: the source's names, dtypes, shards and side files.

Planned and checked from headers before a byte is written. An adapted tensor is read, updated in fp32 and rounded once to its own
dtype; every other tensor's bytes are the source's. Before the directory takes its name, a sample of it is read back and compared with
what it should be, computed anew in fp64. Memory is a few tensors, whatever the model's size.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.files import staged_directory
from nemotune.lora.adapter import Adapter, gains, read_adapter
from nemotune.lora.layers import scale
from nemotune.models.config_json import read_config
from nemotune.models.disk_names import disk_pieces
from nemotune.models.loading import build_model, check_weights
from nemotune.models.saving import copy_side_files
from nemotune.weights import Checkpoint, TensorInfo, WritePlan, write_checkpoint

SAMPLED_TENSORS, SAMPLED_ROWS = 64, 256  # so many updated ones, as many untouched ones; rows of each updated one
TRAINED_WITH = ("chat_template.jinja", "generation_config.json")  # the adapter's own win over the base's: it was trained with them


@dataclass(frozen=True)
class MergePlan:
    """What a merge reads and writes: every tensor, and for the adapted ones the module (and expert) whose update they get."""

    base: Checkpoint
    adapter: Adapter
    write: WritePlan
    updates: dict[str, tuple[str, int | None]]


@dataclass(frozen=True)
class Verified:
    """How many tensors were read back and found right."""

    updated: int
    untouched: int


def plan_merge(base_dir: Path, adapter_dir: Path) -> MergePlan:
    """The plan, every shape checked. Raises CheckpointError, MissingFileError, UnsupportedError."""
    base = Checkpoint(base_dir)
    model = build_model(read_config(base_dir))
    model.source = base
    check_weights(model, base)
    adapter = read_adapter(adapter_dir, model)
    updates = {}
    for disk_name, (name, index) in disk_pieces(model):
        if name.endswith(".weight") and (module := name.removesuffix(".weight")) in adapter.pairs:
            updates[disk_name] = (module, index)
    if model.config.tie_word_embeddings and "lm_head" in adapter.pairs:
        raise UnsupportedError(
            "lora.targets: lm_head is tied to the embeddings of this model, so it cannot be merged; use the adapter as it is"
        )
    return MergePlan(base, adapter, WritePlan(tuple(base.tensors.values())), updates)


def merge(
    base_dir: Path, adapter_dir: Path, target: Path, *, overwrite: bool = False, done: Callable[[int], None] = lambda _: None
) -> Verified:
    """Write the merged model to `target`; `done` is told the bytes of each tensor written. `target` is absent, or whole and verified."""
    plan = plan_merge(base_dir, adapter_dir)

    def read(info: TensorInfo) -> Tensor:
        weight = plan.base.read(info.name)
        if info.name not in plan.updates:
            return weight
        module, expert = plan.updates[info.name]
        return plan.adapter.updated(weight, module, expert).to(weight.dtype)

    with staged_directory(target, overwrite=overwrite, needed_bytes=plan.write.num_bytes) as aside:
        write_checkpoint(aside, plan.write, read, done=done)
        verified = verify(aside, plan, target=target)
        copy_side_files(base_dir, aside)
        for name in TRAINED_WITH:
            if (adapter_dir / name).is_file():
                shutil.copyfile(adapter_dir / name, aside / name)
    return verified


def verify(directory: Path, plan: MergePlan, *, target: Path) -> Verified:
    """Read a sample of the tensors in `directory` back, which is to become `target`. Raises CheckpointError where one is not as planned."""
    written = Checkpoint(directory)
    if written.tensors != plan.base.tensors:
        raise CheckpointError(f"{target}: names, shapes and dtypes as written are not the base's; nothing was kept. Merge again")
    updated, untouched = _sample(plan.updates), _sample(name for name in plan.base.tensors if name not in plan.updates)
    wrong = [name for name in updated if not _is_updated(written.read(name), name, plan)]
    wrong += [name for name in untouched if not torch.equal(_bytes(written.read(name)), _bytes(plan.base.read(name)))]
    if wrong:
        raise CheckpointError(
            f"{target}: {len(wrong)} of {len(updated) + len(untouched)} tensors read back are not base + adapter, first {wrong[0]}; "
            "nothing was kept. Merge again; if it repeats, disk or memory is at fault"
        )
    return Verified(len(updated), len(untouched))


def _sample(names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    return random.Random(0).sample(ordered, min(SAMPLED_TENSORS, len(ordered)))


def _is_updated(written: Tensor, name: str, plan: MergePlan) -> bool:
    """Whether rows of `written` are base + adapter, rounded to its dtype once."""
    module, expert = plan.updates[name]
    rows = slice(None, None, max(1, len(written) // SAMPLED_ROWS))
    A, B = (t.double() if expert is None else t[expert].double() for t in plan.adapter.pairs[module])
    base = plan.base.read(name)[rows].double()
    its = plan.adapter.settings[module]
    exact = base + scale(its) * (B[rows] @ A)
    summed = base.abs() + scale(its) * (B[rows].abs() @ A.abs())
    kind, eps = torch.finfo(written.dtype), torch.finfo(torch.float32).eps
    lost = (4 + its.rank) * eps * summed  # by fp32 sums of rank terms
    if module in plan.adapter.magnitudes:
        gain = gains(plan.adapter.magnitudes[module][rows], exact)
        loss_of_gain = 2 * eps + lost.norm(dim=1, keepdim=True) / exact.norm(dim=1, keepdim=True).clamp(min=kind.tiny)
        exact, lost = gain * exact, gain.abs() * (lost + loss_of_gain * exact.abs())
    # half a unit in the last place of the dtype, and what was lost before it
    allowed = 0.501 * kind.eps * exact.abs().clamp(min=kind.tiny) + lost
    return bool(((written[rows].double() - exact).abs() <= allowed).all())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
