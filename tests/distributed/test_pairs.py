"""Every two ways of sharing the work at once: four processes train as one does, to 1e-5 of each tensor's largest value."""

from __future__ import annotations

import pytest
from processes import in_processes
from random_models import make
from toy_steps import Case, assert_same, take_steps, traces

from nemotune.recipe.degrees import Degrees

PAIRS = {
    "data, shard": Degrees(data=2, shard=2),
    "data, tensor": Degrees(data=2, tensor=2),
    "data, expert": Degrees(data=4, expert=2),
    "data, context": Degrees(data=2, context=2),
    "data, pipeline": Degrees(data=2, pipeline=2),
    "shard, tensor": Degrees(shard=2, tensor=2),
    "shard, expert": Degrees(shard=4, expert=2),
    "shard, context": Degrees(shard=2, context=2),
    "shard, pipeline": Degrees(shard=2, pipeline=2),
    "tensor, expert": Degrees(data=2, tensor=2, expert=2),
    "tensor, context": Degrees(tensor=2, context=2),
    "tensor, pipeline": Degrees(tensor=2, pipeline=2),
    "expert, context": Degrees(context=4, expert=2),
    "expert, pipeline": Degrees(data=2, pipeline=2, expert=2),
    "context, pipeline": Degrees(context=2, pipeline=2),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    directory = tmp_path_factory.mktemp("models")
    for variant in ("hybrid", "llama"):
        make(variant).save_pretrained(directory / variant)
    return {
        "hybrid": Case(directory / "hybrid", dropout=0.3),
        "hybrid, all of it": Case(directory / "hybrid", method="full"),
        "hybrid, balanced": Case(directory / "hybrid", method="full", steps=3, is_balanced=True),
        "llama": Case(directory / "llama"),
        "llama, all of it": Case(directory / "llama", method="full"),
    }


@pytest.fixture(scope="module")
def found(cases):
    return in_processes(4, traces, cases, list(PAIRS.values()))


@pytest.fixture(scope="module")
def alone(cases):
    return {name: take_steps(case) for name, case in cases.items()}


@pytest.mark.parametrize("pair", PAIRS)
def test_four_ranks_equal_one(found, alone, pair):
    for name, trace in alone.items():
        if (name.startswith("llama") and "expert" in pair) or (name == "hybrid, balanced" and "context" in pair):
            continue  # llama has none, and documents are balanced whole
        assert_same(found[name, PAIRS[pair]], trace)
