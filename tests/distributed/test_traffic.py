"""What processes hand to one another is what docs/parallelism.md says, to the byte but for scalars."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch.distributed as dist
from processes import in_processes

from nemotune.distributed import World
from nemotune.recipe.degrees import Degrees

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.models import CONFIGS
from benchmarks.scaling_worker import measure

SCALARS = 2048  # bytes of counts, losses, norms and the numbers of rows that experts are sent
LAYOUTS = [
    ("lora", Degrees(data=2)), ("lora", Degrees(shard=2)), ("lora", Degrees(tensor=2)), ("lora", Degrees(data=2, expert=2)),
    ("lora", Degrees(context=2)), ("lora", Degrees(pipeline=2)), ("full", Degrees(shard=2)), ("full", Degrees(tensor=2)),
]  # fmt: skip


def all_figures(directory):
    return [
        measure(Namespace(model=directory, method=method, steps=3, rows=2), World(degrees, rank=dist.get_rank()))
        for method, degrees in LAYOUTS
    ]


def test_bytes_are_those_of_the_arithmetic(tmp_path):
    small = {"vocab_size": 512, "hidden_size": 64, "hybrid_override_pattern": "ME*M", "num_hidden_layers": 4, "n_routed_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["nemotron_h"] | small))
    for (method, degrees), found in zip(LAYOUTS, in_processes(2, all_figures, tmp_path), strict=True):
        counted = {name.removesuffix("_bytes"): size for name, size in found.items() if name.endswith("_bytes") and size > SCALARS}
        expected = {name.removesuffix("_expected"): size for name, size in found.items() if name.endswith("_expected")}
        assert counted.keys() == expected.keys(), (method, degrees)
        assert all(abs(counted[kind] - expected[kind]) < SCALARS for kind in expected), (method, degrees, counted, expected)
