"""The published configs and a published adapter: our modules have their names and shapes (built on the meta device)."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
from pathlib import Path

import pytest
import torch

from nemotune.lora import apply_lora, lora_modules
from nemotune.lora.adapter import WEIGHTS, read_adapter
from nemotune.models import build_model, parse_config
from nemotune.models.disk_names import disk_pieces
from nemotune.models.layers import GroupedLinear, Linear
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


NARROW = dict(
    vocab_size=64, hidden_size=16, head_dim=4, num_attention_heads=4, num_key_value_heads=2, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8,
    n_groups=2, moe_intermediate_size=12, moe_shared_expert_intermediate_size=20, intermediate_size=12,
)  # fmt: skip


def narrow_nano():
    """Nano 30B with all its layers and experts, a few numbers wide."""
    config = published()["nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"]["config"]
    return build_model(parse_config({**config, **NARROW}))


def write_narrow_adapter(directory, model):
    """An adapter with the keys of the published one, rank 2 and random values. Returns the values by key."""
    values, shapes = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, Linear | GroupedLinear):
            shapes[name] = {"A": (2, module.in_features), "B": (module.out_features, 2)}
    generator = torch.Generator().manual_seed(0)
    for row in manifest():
        owner, which = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.weight", row["key"]).groups()
        values[row["key"]] = torch.randn(shapes[re.sub(r"\.experts\.\d+\.", ".experts.", owner)][which], generator=generator)
    plan = WritePlan(tuple(TensorInfo(key, WEIGHTS, "F32", tuple(value.shape)) for key, value in values.items()))
    write_checkpoint(directory, plan, lambda info: values[info.name])
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 32, "target_modules": sorted({row["projection"] for row in manifest()})}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return values


def test_every_tensor_of_a_published_adapter_is_read(tmp_path):
    """12,008 of them under NVIDIA's own names, one by one; the shapes are held above, so these are narrow."""
    model = narrow_nano()
    values = write_narrow_adapter(tmp_path, model)
    assert len(values) == 12008
    pairs = read_adapter(tmp_path, model).pairs
    got = {}
    for name, pair in pairs.items():
        owner, _, last = name.rpartition(".")
        for which, tensor in zip("AB", pair, strict=True):
            units = {f"{owner}.{e}.{last}": tensor[e] for e in range(len(tensor))} if tensor.ndim == 3 else {name: tensor}
            got |= {f"base_model.model.{unit}.lora_{which}.weight": value for unit, value in units.items()}
    assert got.keys() == values.keys() and all(torch.equal(got[key], value) for key, value in values.items())
    assert {row["dtype"] for row in manifest()} == {"F32"}, "as we save, whatever the base's dtype"
