"""Two processes, and four, train as one does: losses, gradients and what comes out, for every way to share the work."""

from __future__ import annotations

import pytest
from processes import in_processes
from random_models import make
from toy_steps import Case, assert_same, take_steps, traces

from nemotune.recipe.degrees import Degrees

TWO = [Degrees(data=2)]


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    directory = tmp_path_factory.mktemp("models")
    for variant in ("hybrid", "llama"):
        make(variant).save_pretrained(directory / variant)
    return {
        "hybrid": Case(directory / "hybrid"),
        "hybrid with dropout": Case(directory / "hybrid", dropout=0.3, steps=2),
        "hybrid, all of it": Case(directory / "hybrid", method="full"),
        "llama": Case(directory / "llama"),
        "llama, all of it": Case(directory / "llama", method="full"),
    }


@pytest.fixture(scope="module")
def alone(cases):
    return {name: take_steps(case) for name, case in cases.items()}


def test_two_ranks_equal_one(cases, alone):
    for (name, _), trace in in_processes(2, traces, cases, TWO).items():
        assert_same(trace, alone[name])
