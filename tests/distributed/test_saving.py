"""What several processes leave is what one process leaves that holds the same values: the same files, byte for byte."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from random_models import make
from toy_steps import TARGETS

from nemotune.distributed import World, arrange, connect, divide
from nemotune.distributed.whole import empty_whole, whole_tensors
from nemotune.engines.native import save_trained
from nemotune.errors import DiskFullError
from nemotune.lora import apply_lora, coverage, lora_modules
from nemotune.models import CausalLM, load_model
from nemotune.recipe import Recipe, load
from nemotune.recipe.degrees import Degrees

TWO = [Degrees(data=2), Degrees(shard=2), Degrees(tensor=2), Degrees(data=2, expert=2), Degrees(pipeline=2)]
METHODS = ("lora", "full", "random")


def trained(directory: Path, method: str, world: World) -> tuple[CausalLM, Recipe]:
    """What `world` holds of a model whose adapters, or whose fresh weights, are a function of their names."""
    settings = (
        f"model.path={directory}",
        "model.dtype=float32",
        f"method={'lora' if method == 'lora' else 'full'}",
        "lora.rank=4",
        "export.merged=false",
    )
    targets = [f"lora.targets=[{','.join(TARGETS['nemotron_h'])}]"] if method == "lora" else []
    recipe = load("quickstart", (*settings, *targets))
    model = load_model(
        directory, dtype="float32", trainable=method != "lora", arrange=partial(arrange, world=world), random_seed=5 if method == "random" else None,
        ready=partial(divide, world=world, compute_dtype=torch.float32),
    )  # fmt: skip
    keys = apply_lora(model, recipe.lora, seed=3) if method == "lora" else None
    with torch.no_grad():
        for name, layer in lora_modules(model):
            for which, layout in layer.layouts().items():
                generator = torch.Generator().manual_seed(len(name) + len(which))
                getattr(layer, which).copy_(layout.take(torch.randn(layout.shape, generator=generator)))
    connect(model, world, keys)
    return model, recipe


def save(directory: Path, method: str, world: World, to: Path) -> None:
    model, recipe = trained(directory, method, world)
    with whole_tensors(model, world) as values:
        if values is not None:
            save_trained(model, recipe, to, values=values if world.size > 1 else None)


def save_in_two(directory: Path, root: Path) -> bool:
    for each in TWO:
        world = World(each, rank=dist.get_rank())
        for method in METHODS:
            save(directory, method, world, root / str(TWO.index(each)) / method)
    try:  # an error of the one that writes ends the others' wait
        with whole_tensors(trained(directory, "lora", world)[0], world) as values:
            if values is not None:
                raise DiskFullError("full")
    except DiskFullError:
        return world.is_first
    return not world.is_first


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "hybrid"
    make("hybrid").save_pretrained(directory)
    return directory


def test_several_processes_leave_the_files_of_one(directory, tmp_path):
    for method in METHODS:
        save(directory, method, World(), tmp_path / "one" / method)
    assert in_processes(2, save_in_two, directory, tmp_path)
    expected = {path.relative_to(tmp_path / "one"): path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert {path.parts[0] for path in expected} == set(METHODS) and len(expected) >= 2 * len(METHODS)
    for index, each in enumerate(TWO):
        root = tmp_path / str(index)
        found = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        assert found.keys() == expected.keys() and [path for path in found if found[path] != expected[path]] == [], each


def test_coverage_is_that_of_the_whole_model(directory):
    """Which is told without its values."""
    model, recipe = trained(directory, "lora", World())
    empty = empty_whole(model)
    apply_lora(empty, recipe.lora)
    assert json.dumps(coverage(empty).to_json()) == json.dumps(coverage(model).to_json())
