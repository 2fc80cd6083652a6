"""Base + adapter -> Hugging Face directory, shard by shard: the source's names, dtypes, shards and side files.

Planned and checked from headers before a byte is written. An adapted tensor is read, updated in fp32 and rounded once to its own
dtype; every other tensor's bytes are the source's. Memory is a few tensors, whatever the model's size.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nemotune.errors import UnsupportedError
from nemotune.files import staged_directory
from nemotune.lora.adapter import Adapter, read_adapter
from nemotune.models.config import read_config
from nemotune.models.loading import build_model, check_weights, copy_side_files, disk_pieces
from nemotune.weights import Checkpoint, TensorInfo, WritePlan, write_checkpoint

TRAINED_WITH = ("chat_template.jinja", "generation_config.json")  # the adapter's own win over the base's: it was trained with them


@dataclass(frozen=True)
class MergePlan:
    """What a merge reads and writes: every tensor, and for the adapted ones the module (and expert) whose update they get."""

    base: Checkpoint
    adapter: Adapter
    write: WritePlan
    updates: dict[str, tuple[str, int | None]]


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
) -> MergePlan:
    """Write the merged model to `target`; `done` is told the bytes of each tensor written. `target` is absent or whole."""
    plan = plan_merge(base_dir, adapter_dir)

    def read(info: TensorInfo) -> Tensor:
        weight = plan.base.read(info.name)
        if info.name not in plan.updates:
            return weight
        module, expert = plan.updates[info.name]
        return (weight.float() + plan.adapter.delta(module, expert)).to(weight.dtype)

    with staged_directory(target, overwrite=overwrite, needed_bytes=plan.write.num_bytes) as aside:
        write_checkpoint(aside, plan.write, read, done=done)
        copy_side_files(base_dir, aside)
        for name in TRAINED_WITH:
            if (adapter_dir / name).is_file():
                shutil.copyfile(adapter_dir / name, aside / name)
    return plan
