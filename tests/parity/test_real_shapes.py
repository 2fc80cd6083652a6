"""The published configs and a published adapter: our modules have their names and shapes (built on the meta device)."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from nemotune.lora import apply_lora, lora_modules
from nemotune.lora.adapter import WEIGHTS, read_adapter
from nemotune.models import build_model, parse_config
from nemotune.models.disk_names import disk_pieces
from nemotune.recipe import Lora
from nemotune.weights import TensorInfo, WritePlan, write_checkpoint

DATA = os.environ.get("NEMOTUNE_TEST_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="NEMOTUNE_TEST_DATA is not set")

BILLIONS = {  # as the models are called, or as their cards count
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (31.5, 31.6),
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": (8.8, 9.0),
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16": (120.0, 124.0),
    "nvidia/Nemotron-H-8B-Base-8K": (8.0, 8.2),
    "nvidia/Llama-3.1-Nemotron-Nano-8B-v1": (8.0, 8.1),
    "nvidia/Llama-3.1-Nemotron-Nano-4B-v1.1": (4.4, 4.6),
    "nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16": (3.9, 4.1),
}


def published():
    return json.loads((Path(DATA) / "data/nemotron/configs/known_config_values.json").read_text())


@pytest.mark.parametrize("name", BILLIONS)
def test_published_configs_build_with_the_size_that_they_are_named_for(name):
    model = build_model(parse_config(published()[name]["config"]))
    low, high = BILLIONS[name]
    assert low < sum(p.numel() for p in model.parameters()) / 1e9 < high


def test_nano_4b_has_as_many_tensors_as_its_checkpoint():
    entry = published()["nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16"]
    assert len(list(disk_pieces(build_model(parse_config(entry["config"]))))) == entry["checkpoint_tensor_count"]


def test_lora_on_nano_30b_has_the_tensors_of_a_published_adapter():
    model = build_model(parse_config(published()["nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"]["config"]))
    apply_lora(model, Lora(rank=32, targets=("attention", "mamba", "shared_experts", "experts")))
    ours = {}
    for name, layer in lora_modules(model):
        for which, tensor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            owner, _, last = name.rpartition(".")
            names = [f"{owner}.{e}.{last}" for e in range(len(tensor))] if tensor.ndim == 3 else [name]
            ours |= {f"base_model.model.{each}.{which}.weight": "x".join(map(str, tensor.shape[-2:])) for each in names}
    theirs = {row["key"]: row["shape"] for row in manifest()}
    assert len(theirs) == 12008
    assert ours == theirs


def manifest():
    """A row for each tensor of the published adapter."""
    with gzip.open(Path(DATA) / "data/nemotron/adapters/nemotron3_nano_30b_lora_r32.tensor_manifest.tsv.gz", "rt") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_the_linear_modules_of_a_published_adapter_are_read(tmp_path):
    """All its tensors but those of experts, which it keeps one by one: 232 of real shapes, under NVIDIA's own names."""
    rows = [row for row in manifest() if row["expert_kind"] != "per_expert"]
    plan = WritePlan(tuple(TensorInfo(row["key"], WEIGHTS, row["dtype"], tuple(map(int, row["shape"].split("x")))) for row in rows))
    write_checkpoint(tmp_path, plan, lambda info: torch.zeros(info.shape))
    projections = sorted({row["projection"] for row in rows})
    config = {"peft_type": "LORA", "r": 32, "lora_alpha": 32, "target_modules": projections}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = build_model(parse_config(published()["nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"]["config"]))
    pairs = read_adapter(tmp_path, model).pairs
    assert {f"base_model.model.{name}.{which}.weight" for name in pairs for which in ("lora_A", "lora_B")} == {row["key"] for row in rows}
    assert {row["dtype"] for row in manifest()} == {"F32"}, "as we save, whatever the base's dtype"
