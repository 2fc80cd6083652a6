"""What lies beside the tensors of a Megatron checkpoint: the superset that Megatron-Bridge 0.3 and 0.7 read, and the Hugging Face side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from nemotune.export.megatron.checkpoint import LATEST, RUN_CONFIG, TOKENIZER
from nemotune.export.megatron.homes import Config
from nemotune.export.megatron.run_config import run_config
from nemotune.models.saving import copy_side_files

COMMON = {  # 0.3 needs it, newer ones still read it
    "checkpoint_version": 3.0, "iteration": 0,
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}  # fmt: skip
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
COUNTERS = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")


def write_side_files(
    target: Path, iteration: str, *, config: Config, beside: Path, mtp_depth: int = 0, more: dict[str, Any] | None = None
) -> None:
    """Write them into `target`. `beside`: the Hugging Face directory of the model; `more`: sections of run_config.yaml of its own.

    `tokenizer/` gets config.json too, so that the way back needs no base.
    """
    directory = target / iteration
    told = run_config(config, tokenizer=str(beside.resolve()), mtp_depth=mtp_depth)
    (directory / RUN_CONFIG).write_text(yaml.safe_dump({**told, **(more or {})}), encoding="utf-8")
    (directory / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")
    torch.save(COMMON, directory / "common.pt")
    torch.save(_train_state(), directory / "train_state.pt")
    torch.save(_train_state(), target / "latest_train_state.pt")
    (target / LATEST).write_text(str(int(iteration.removeprefix("iter_"))), encoding="utf-8")
    (directory / TOKENIZER).mkdir(exist_ok=True)
    copy_side_files(beside, directory / TOKENIZER)


def _train_state() -> dict[str, torch.Tensor]:
    counted = {name: torch.tensor(0, dtype=torch.int32) for name in COUNTERS}
    flags = {name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")}
    return {**counted, "floating_point_operations_so_far": torch.tensor(0.0), **flags}
