"""Two processes train as one does whatever they share, and four whatever two ways of sharing are combined.

First gradients, ten losses, what comes out and the held-out loss agree to 1e-5 of each tensor's largest value.
"""

from __future__ import annotations

import pytest
from processes import in_processes
from random_models import make
from toy_steps import Case, Trace, assert_same, take_steps, traces

from nemotune.recipe.degrees import Degrees

AXES = {
    "data": Degrees(data=2), "shard": Degrees(shard=2), "tensor": Degrees(tensor=2), "expert": Degrees(data=2, expert=2),
    "context": Degrees(context=2), "pipeline": Degrees(pipeline=2),
}  # fmt: skip
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
REFUSED = {  # which parallel.py does by key, or there is nothing to divide
    "llama": {"expert"}, "llama, all of it": {"expert"}, "hybrid, balanced": {"context"}, "hybrid over NF4": {"shard", "tensor"},
}  # fmt: skip
BOTH = ("hybrid", "hybrid, all of it", "hybrid, balanced", "llama", "llama, all of it")
OF_TWO = (*BOTH, "hybrid without dropout", "hybrid, AdamW", "hybrid over NF4")


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    directory = tmp_path_factory.mktemp("models")
    for variant in ("hybrid", "llama"):
        make(variant).save_pretrained(directory / variant)
    return {
        "hybrid": Case(directory / "hybrid", dropout=0.3),
        "hybrid without dropout": Case(directory / "hybrid"),
        "hybrid, AdamW": Case(directory / "hybrid", optimizer="adamw", learning_rate=1e-3),
        "hybrid, all of it": Case(directory / "hybrid", method="full"),
        "hybrid, balanced": Case(directory / "hybrid", method="full", steps=3, is_balanced=True),
        "hybrid over NF4": Case(directory / "hybrid", quantization="nf4", steps=3),
        "llama": Case(directory / "llama"),
        "llama, all of it": Case(directory / "llama", method="full"),
    }


@pytest.fixture(scope="module")
def alone(cases) -> dict[str, Trace]:
    return {name: take_steps(case) for name, case in cases.items()}


def found_by(ways: dict[str, Degrees], processes: int, cases: dict[str, Case]) -> dict[tuple[str, str], Trace]:
    """What so many processes find in each way of sharing, in one start of them."""
    asked = [({name: case for name, case in cases.items() if not REFUSED.get(name, set()) & {*way.split(", ")}}, ways[way]) for way in ways]
    found = in_processes(processes, all_traces, asked)
    return {(way, name): found[name, degrees] for way, degrees in ways.items() for name in cases if (name, degrees) in found}


def all_traces(asked: list[tuple[dict[str, Case], Degrees]]) -> dict[tuple[str, Degrees], Trace]:
    return {key: trace for cases, degrees in asked for key, trace in traces(cases, [degrees]).items()}


@pytest.fixture(scope="module")
def two(cases):
    return found_by(AXES, 2, {name: cases[name] for name in OF_TWO})


@pytest.fixture(scope="module")
def four(cases):
    return found_by(PAIRS, 4, {name: cases[name] for name in BOTH})


def assert_equal(way: str, found: dict[tuple[str, str], Trace], alone: dict[str, Trace], names: tuple[str, ...]) -> None:
    compared = [name for name in names if not REFUSED.get(name, set()) & {*way.split(", ")}]
    for name in compared:
        assert_same(found[way, name], alone[name], weights="AdamW" not in name)  # which magnifies rounding


@pytest.mark.parametrize("axis", AXES)
def test_two_ranks_equal_one(two, alone, axis):
    assert_equal(axis, two, alone, OF_TWO)


@pytest.mark.parametrize("pair", PAIRS)
def test_four_ranks_equal_one(four, alone, pair):
    assert_equal(pair, four, alone, BOTH)
