"""Weights divided by FSDP train as whole ones do; small fp32 tensors stay whole."""

from __future__ import annotations

import pytest
from processes import in_processes
from random_models import make
from toy_steps import Case, assert_same, take_steps, traces

from nemotune.recipe.degrees import Degrees


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    directory = tmp_path_factory.mktemp("models")
    for variant in ("hybrid", "llama_tied"):
        make(variant).save_pretrained(directory / variant)
    return {
        "hybrid": Case(directory / "hybrid", dropout=0.3, steps=2),
        "hybrid, computed again": Case(directory / "hybrid", method="full", steps=2, checkpointing="full"),
        "hybrid, AdamW": Case(directory / "hybrid", method="full", steps=3, optimizer="adamw", learning_rate=1e-3),
        "hybrid, in bf16": Case(directory / "hybrid", method="full", steps=1, dtype="bfloat16"),
        "hybrid, its head too": Case(directory / "hybrid", steps=3, targets=("lm_head", "experts")),
        "llama with one tensor for embeddings and head": Case(directory / "llama_tied", method="full", steps=3),
    }


@pytest.fixture(scope="module")
def alone(cases):
    return {name: take_steps(case) for name, case in cases.items()}


def test_divided_weights_train_as_whole_ones(cases, alone):
    for (name, _), trace in in_processes(2, traces, cases, [Degrees(shard=2)]).items():
        assert_same(trace, alone[name], weights="AdamW" not in name)
