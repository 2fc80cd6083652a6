"""The plan counts what a run will hold, from config.json alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from random_models import make

from nemotune.errors import RecipeError
from nemotune.lora import apply_lora
from nemotune.models import load_model
from nemotune.models.offload import expert_blocks
from nemotune.plan.cost import cost_line, estimate, flops_line
from nemotune.recipe import Recipe
from nemotune.train.flops import Flops

DATA = os.environ.get("NEMOTUNE_TEST_DATA")


def recipe(path, **changes):
    tree = {"name": "x", "model": {"path": str(path), "dtype": "bfloat16"}, "data": {"format": "chat", "train": "rows.jsonl"}}
    return Recipe.model_validate({**tree, **changes})


def held_bytes(model):
    """The bytes of everything in memory: parameters, once each, and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


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
    apply_lora(model, recipe(hybrid, lora={"rank": 4}).lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert cost.trained_parameters == cost.coverage.parameters == trained
    assert (cost.held.weight_bytes, cost.held.gradient_bytes, cost.held.optimizer_bytes) == (
        held_bytes(model),
        4 * trained,
        moments * trained,
    )


@pytest.mark.parametrize("variant", ["hybrid", "latent", "llama_biased", "llama_tied"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_weights_cost_what_a_loaded_model_holds(tmp_path, variant, quantization):
    make(variant).save_pretrained(tmp_path / "hf")
    asked = recipe(tmp_path / "hf", model={"path": str(tmp_path / "hf"), "quantization": quantization})
    cost, model = estimate(asked), load_model(tmp_path / "hf", quantization=quantization)
    base_parameters = sum(p.numel() for p in load_model(tmp_path / "hf").parameters())
    apply_lora(model, asked.lora)
    assert cost.held.weight_bytes == held_bytes(model) and cost.coverage.base_parameters == base_parameters


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_offloaded_experts_cost_two_blocks_on_the_device_and_all_of_them_on_the_host(tmp_path, quantization):
    make("grouped_router").save_pretrained(tmp_path / "hf")  # three blocks of experts
    asked = recipe(tmp_path / "hf", model={"path": str(tmp_path / "hf"), "quantization": quantization, "offload": "experts"})
    cost, model = estimate(asked), load_model(tmp_path / "hf", quantization=quantization, offload="experts")
    lender = expert_blocks(model)[0][0].lent.lender
    apply_lora(model, asked.lora)
    on_host = sum(t.nbytes for tensors in lender.host for t in tensors)
    buffers = sum(t.nbytes for buffer in lender.buffers for t in buffer.tensors)
    assert (cost.held.host_bytes, cost.held.weight_bytes) == (on_host, held_bytes(model) - on_host + buffers) and buffers * 3 == on_host * 2
    assert f"; experts in host memory {on_host / 1000:.1f} kB" in cost_line(cost)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_magnitudes_of_dora_are_counted(hybrid, quantization):
    model = {"path": str(hybrid), "dtype": "bfloat16", "quantization": quantization}
    asked = recipe(hybrid, model=model, lora={"rank": 4, "dora": True, "targets": ["attention", "mlp"]})
    cost, held = estimate(asked), load_model(hybrid, dtype="bfloat16", quantization=quantization)
    apply_lora(held, asked.lora)
    outputs = 2 * 32 + 2 * 16 + 48 + 32
    plain = recipe(hybrid, lora={"rank": 4, "targets": ["attention", "mlp"]})
    assert cost.trained_parameters == estimate(plain).trained_parameters + outputs and cost.held.weight_bytes == held_bytes(held)


@pytest.mark.skipif(not DATA, reason="NEMOTUNE_TEST_DATA is not set")
def test_nano_30b_at_four_bits_leaves_room_on_24_gb(tmp_path):
    source = Path(DATA) / "data/nemotron/configs/NVIDIA-Nemotron-3-Nano-30B-A3B.config.VERBATIM.json"
    (tmp_path / "config.json").write_bytes(source.read_bytes())
    lora = {"rank": 16, "targets": ["attention", "mamba", "shared_experts"]}
    cost = estimate(recipe(tmp_path, model={"path": str(tmp_path), "quantization": "nf4"}, lora=lora, train={"optimizer": "adamw_8bit"}))
    assert cost.coverage.base_parameters == 31_577_937_344
    assert cost.held.total_bytes == 17_487_630_876  # 6.5 GB are left for activations


@pytest.mark.skipif(not DATA, reason="NEMOTUNE_TEST_DATA is not set")
def test_nano_30b_with_its_experts_on_the_host_is_told(tmp_path):
    source = Path(DATA) / "data/nemotron/configs/NVIDIA-Nemotron-3-Nano-30B-A3B.config.VERBATIM.json"
    (tmp_path / "config.json").write_bytes(source.read_bytes())
    lora, train = {"rank": 16, "targets": ["attention", "mamba", "shared_experts"]}, {"optimizer": "adamw_8bit"}
    told = (Path(__file__).parents[3] / "docs" / "lora.md").read_text()
    for quantization in ("nf4", "none"):
        cost = estimate(
            recipe(tmp_path, model={"path": str(tmp_path), "quantization": quantization, "offload": "experts"}, lora=lora, train=train)
        )
        assert f"{cost.held.total_bytes:,} bytes on the GPU and {cost.held.host_bytes:,} in host memory" in told


def test_full_tuning_costs_fp32_everywhere(hybrid):
    model = load_model(hybrid)
    parameters, buffers = (sum(t.numel() for t in tensors) for tensors in (model.parameters(), model.buffers()))
    cost = estimate(recipe(hybrid, method="full"))
    assert cost.trained_parameters == parameters and cost.held.total_bytes == 16 * parameters + 4 * buffers
    assert f"together {cost.held.total_bytes / 1000:,.1f} kB" in cost_line(cost)


def test_a_config_is_enough_and_its_faults_are_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type"):
        estimate(recipe(tmp_path))


def test_routers_to_balance_that_are_not_there_are_refused_from_the_config(tmp_path):
    make("llama").save_pretrained(tmp_path)
    asked = recipe(tmp_path, method="full", train={"router_aux_loss_coef": 1e-4})
    with pytest.raises(RecipeError, match=r"train.router_aux_loss_coef: got 0.0001, expected 0: this llama has no experts"):
        estimate(asked)


def test_a_token_s_operations_are_told(hybrid):
    """A document of 90 tokens has 4,095 pairs of query and key: 45.5 a token."""
    asked = recipe(hybrid, data={"format": "chat", "train": "rows.jsonl", "sequence_length": 90})
    cost, model = estimate(asked), load_model(hybrid)
    apply_lora(model, asked.lora)
    flops = Flops.of(model)
    assert cost.flops_per_token == flops.per_token + flops.per_target + 45.5 * flops.per_pair
    assert flops_line(cost) == (
        f"A supervised token in a document of 90 takes {cost.flops_per_token / 1e9:.3g} GFLOP, forward and backward"
    )


def held(path, **parallel):
    return estimate(recipe(path, method="full", parallel=parallel)).held


def test_one_of_several_processes_holds_what_the_degrees_leave_it(tmp_path):
    """Full tuning: 16 bytes a parameter, whatever the division."""
    make("hybrid").save_pretrained(tmp_path)
    model = load_model(tmp_path)
    alone, sizes = held(tmp_path), {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".mixer.experts." in name)
    divided = {
        name for name, p in model.named_parameters() if p.ndim > 1 and not any(word in name for word in ("conv1d", "mixer.gate.", "norm"))
    }
    assert held(tmp_path, nproc=2) == alone == held(tmp_path, nproc=2, context=2)
    assert alone.total_bytes - held(tmp_path, nproc=2, expert=2).total_bytes == 16 * experts // 2
    rows = sum(sizes[name] // 2 for name in divided)
    assert alone.total_bytes - held(tmp_path, nproc=2, shard=2).total_bytes == 16 * rows
    both = sum(sizes[name] // 2 for name in divided if ".mixer.experts." not in name) + experts // 2
    assert alone.total_bytes - held(tmp_path, nproc=2, shard=2, expert=2).total_bytes == 16 * both
    stage = held(tmp_path, nproc=2, pipeline=2)
    assert alone.total_bytes / 2 <= stage.total_bytes < alone.total_bytes
    assert held(tmp_path, nproc=2, tensor=2).total_bytes < 0.7 * alone.total_bytes


def test_memory_of_several_processes_is_told_of_one(hybrid):
    asked = recipe(hybrid, method="full", parallel={"nproc": 4, "shard": 2, "tensor": 2})
    own, step = cost_line(estimate(asked)).splitlines()
    assert own.startswith("Memory of one process of 4 (that which holds the most) before activations: weights ")
    assert step.endswith(" more on a GPU before parallel.tensor=2 divides that")
    assert cost_line(estimate(recipe(hybrid, parallel={"nproc": 4}))).endswith(" at its peak")
