"""Stages of whole layers, 1F1B between them, train as one process does: fewer and more micro batches than stages, rows of any length."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from random_models import make
from rich.console import Console
from toy_split import ToySplit
from toy_steps import LENGTHS, PACKS, Case, Trace, assert_same, take_steps, traces

from nemotune.data.loader import Loader
from nemotune.distributed import World, arrange
from nemotune.distributed.world import TOKENS
from nemotune.models import load_model
from nemotune.recipe import load
from nemotune.recipe.degrees import Degrees
from nemotune.train.activation import set_activation_checkpointing
from nemotune.train.balance import Balance
from nemotune.train.step import accumulate
from nemotune.train.validation import Validation

TWO_STAGES, FOUR_STAGES = Degrees(pipeline=2), Degrees(pipeline=4)
BESIDE_DATA = Degrees(pipeline=2, data=2)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    directory = tmp_path_factory.mktemp("models")
    for variant in ("hybrid", "llama", "llama_tied"):
        make(variant).save_pretrained(directory / variant)
    return {
        "hybrid": Case(directory / "hybrid"),
        "dropout, blocks computed again": Case(directory / "hybrid", dropout=0.3, steps=2, checkpointing="full"),
        "a stage without adapters": Case(directory / "hybrid", targets=("attention",), steps=2),
        "hybrid, all of it": Case(directory / "hybrid", method="full", steps=3),
        "hybrid, in bf16": Case(directory / "hybrid", method="full", steps=1, dtype="bfloat16"),
        "llama": Case(directory / "llama", dropout=0.3, steps=3),
        "llama, all of it": Case(directory / "llama", method="full", steps=2),
        "llama, tied": Case(directory / "llama_tied", steps=2),
    }


@pytest.fixture(scope="module")
def alone(cases) -> dict[str, Trace]:
    return {name: take_steps(case) for name, case in cases.items()}


def test_two_stages_equal_one_process(cases, alone):
    for (name, _), trace in in_processes(2, traces, cases, [TWO_STAGES]).items():
        assert_same(trace, alone[name])


def sum_in_a_group_that_some_have() -> float:
    """Over data ranks, of which those of the first stage alone have met before."""
    world = World(BESIDE_DATA, rank=dist.get_rank())
    world.make_groups([world.ranks("data")] if world.index("pipeline") == 0 else [])
    return world.sum(torch.ones(()), "data").item()


def four(cases: dict[str, Case]) -> tuple[dict[tuple[str, Degrees], Trace], list[dict[str, Any]]]:
    assert sum_in_a_group_that_some_have() == 2
    dropped, full = ({name: cases[name]} for name in ("dropout, blocks computed again", "hybrid, all of it"))
    found = traces(dropped | full, [FOUR_STAGES, BESIDE_DATA])
    world = World(FOUR_STAGES, rank=dist.get_rank())
    return found, world.gather(watched_step(cases["hybrid"].directory, world))


def test_four_stages_and_two_beside_data_ranks_equal_one_process(cases, alone):
    """Four stages have as many micro batches as they are, then one; two of them beside two data ranks have two, then one and a filler.

    Each of the four watches the routers of its own layers, of which two have none, and what is told is of all.
    """
    found, watched = in_processes(4, four, cases)
    for (name, _), trace in found.items():
        assert_same(trace, alone[name])
    of_all, tensors = watched_step(cases["hybrid"].directory, World()), {}
    for of_stage in watched:
        assert of_stage["metrics"] == of_all["metrics"]
        torch.testing.assert_close(of_stage["measured"], of_all["measured"], rtol=1e-5, atol=0)
        assert not tensors.keys() & of_stage["tensors"].keys()
        tensors |= of_stage["tensors"]
    assert tensors.keys() == of_all["tensors"].keys()
    for name, value in of_all["tensors"].items():
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=1e-5 * value.abs().max().item())


def watched_step(directory: Path, world: World) -> dict[str, Any]:
    """The routers' biases and gradients after a step that balances them, its blocks computed again, and what a held-out pass counts."""
    model = load_model(directory, dtype="float32", trainable=True, arrange=partial(arrange, world=world))
    set_activation_checkpointing(model, "full")
    split = ToySplit(LENGTHS, packs=PACKS)
    metrics: list[dict[str, Any]] = []
    kept = SimpleNamespace(rows=list, write=lambda kind, step, **row: metrics.append(row))
    recipe = load("quickstart", ["train.eval_every=1", "train.micro_batch_size=1", "data.sequence_length=32"])
    held_out = Validation(model, split, recipe, metrics=kept, last_step=1, world=world)
    held_out.begin(step=0, console=Console(quiet=True))
    balance = Balance(model, rate=1e-3, coef=1e-1, total=lambda summed: world.sum(summed, "pipeline", *TOKENS))
    batches = Loader(split, global_batch_size=4, micro_batch_size=1, seed=0).step(0)
    accumulate(model.train(), batches, keys=None, seed=0, step=0, balance=balance, world=world)
    measured = balance.step()
    named = dict(model.named_parameters())
    gradients = {name: p.grad for name, p in named.items() if ".gate." in name}
    biases = {name: value.clone() for name, value in model.named_buffers() if "bias" in name}
    return {"metrics": metrics, "measured": measured, "tensors": {**gradients, **biases}}
