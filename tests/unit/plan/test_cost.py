"""The plan counts what a run will hold, from config.json alone."""

from __future__ import annotations

import json

import pytest
from random_models import make

from nemotune.lora import apply_lora
from nemotune.models import load_model
from nemotune.plan.cost import cost_line, estimate
from nemotune.recipe import Recipe


def recipe(path, **changes):
    tree = {"name": "x", "model": {"path": str(path), "dtype": "bfloat16"}, "data": {"format": "chat", "train": "rows.jsonl"}}
    return Recipe.model_validate({**tree, **changes})


@pytest.fixture
def hybrid(tmp_path):
    make("hybrid").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("optimizer, moments", [("adamw", 8), ("adamw_8bit", 2)])
def test_lora_costs_frozen_weights_and_fp32_adapters(hybrid, optimizer, moments):
    config_only = hybrid.parent / "config_only"
    config_only.mkdir()
    (config_only / "config.json").write_text((hybrid / "config.json").read_text())
    cost = estimate(recipe(config_only, lora={"rank": 4}, train={"optimizer": optimizer}))
    model = load_model(hybrid, dtype="bfloat16")
    base = sum(p.numel() for p in model.parameters())
    apply_lora(model, recipe(hybrid, lora={"rank": 4}).lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert cost.trained_parameters == cost.coverage.parameters == trained
    assert (cost.weight_bytes, cost.gradient_bytes, cost.optimizer_bytes) == (2 * base + 4 * trained, 4 * trained, moments * trained)


def test_full_tuning_costs_fp32_everywhere(hybrid):
    parameters = sum(p.numel() for p in load_model(hybrid).parameters())
    cost = estimate(recipe(hybrid, method="full"))
    assert cost.trained_parameters == parameters and cost.total_bytes == 16 * parameters
    assert f"together {cost.total_bytes / 1000:,.1f} kB" in cost_line(cost)


def test_a_config_is_enough_and_its_faults_are_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type"):
        estimate(recipe(tmp_path))
