"""config.json in every spelling, and what a wrong one says."""

from __future__ import annotations

import json
import math

import pytest

from nemotune.errors import CheckpointError, MissingFileError
from nemotune.models import LlamaConfig, parse_config, read_config
from nemotune.ops.rope import Llama3Scaling

HYBRID = {
    "model_type": "nemotron_h", "vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2,
    "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40,
}  # fmt: skip
LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
}


@pytest.mark.parametrize(
    "spelling",
    [
        {"hybrid_override_pattern": "ME*-"},
        {"hybrid_override_pattern": "ME|*-/*E"},
        {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
        {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    ],
)
def test_block_types_are_read_in_every_spelling(spelling):
    assert parse_config({**HYBRID, **spelling}).block_types == ("mamba", "moe", "attention", "mlp")


def test_the_number_of_layers_is_that_of_the_pattern_without_its_mtp_blocks():
    assert parse_config({**HYBRID, "hybrid_override_pattern": "ME|*-/*E", "num_hidden_layers": 4}).num_layers == 4


@pytest.mark.parametrize("key", ["n_groups", "mamba_n_groups", "mamba_num_groups"])
def test_groups_are_read_in_every_spelling(key):
    config = {**HYBRID, "hybrid_override_pattern": "M"}
    del config["n_groups"]
    assert parse_config({**config, key: 4}).n_groups == 4


def test_infinity_is_read_as_transformers_5_writes_it():
    config = parse_config({**HYBRID, "hybrid_override_pattern": "M", "time_step_limit": [0.0, {"__float__": "Infinity"}]})
    assert config.time_step_limit == (0.0, math.inf)
    assert parse_config({**HYBRID, "hybrid_override_pattern": "M"}).time_step_limit == (0.0, math.inf)


def test_mamba_width_is_heads_times_head_dim_whatever_expand_says():
    assert parse_config({**HYBRID, "hybrid_override_pattern": "M", "expand": 7}).mamba_inner_size == 64


ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {**ROPE, "rope_type": "llama3"}},
        {"rope_parameters": {**ROPE, "rope_type": "llama3", "rope_theta": 5e5}},
    ],
)
def test_rope_is_read_in_both_spellings(spelling):
    config = parse_config({**LLAMA, **spelling})
    assert isinstance(config, LlamaConfig)
    assert config.rope_theta == 5e5 and config.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "mistral"}, "model_type: got 'mistral', expected one of nemotron_h, llama"),
        ({"hybrid_override_pattern": "MX"}, "unknown block type 'X'"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act: got 'silu', expected 'relu2'"),
        ({"ssm_state_size": None}, "no 'ssm_state_size'"),
        ({"num_hidden_layers": 3}, r"num_hidden_layers: got 3, but hybrid_override_pattern has 2 blocks"),
        ({"layers_block_type": ["moe"], "num_hidden_layers": 2}, r"num_hidden_layers: got 2, but layers_block_type has 1 block\b"),
    ],
)
def test_a_config_that_does_not_fit_is_named(change, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**HYBRID, "hybrid_override_pattern": "ME", **change}))
    with pytest.raises(CheckpointError, match=words):
        read_config(tmp_path)


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_linear_rope_scaling_is_its_factor(key):
    assert parse_config({**LLAMA, "rope_scaling": {key: "linear", "factor": 4.0}}).rope_scaling == 4.0


@pytest.mark.parametrize("scaling", [{}, {"factor": None}, {"factor": "4"}, {"factor": 0}])
def test_rope_scaling_without_its_numbers_is_named(scaling):
    with pytest.raises(CheckpointError, match=r"rope_scaling\.factor: got .*, expected a number over 0, as linear needs it"):
        parse_config({**LLAMA, "rope_scaling": {"rope_type": "linear", **scaling}})
    with pytest.raises(CheckpointError, match=r"rope_scaling\.original_max_position_embeddings: got None, .* as llama3 needs it"):
        parse_config({**LLAMA, "rope_scaling": {**ROPE, "original_max_position_embeddings": None, "rope_type": "llama3"}})


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"])
@pytest.mark.parametrize("value", [0, -1, "32", 2.5, True])
def test_a_size_that_is_no_count_is_named(key, value):
    with pytest.raises(CheckpointError, match=rf"{key}: got {value!r}, expected a whole number from 1 on"):
        parse_config({**LLAMA, key: value})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"time_step_limit": [0.1]}, r"time_step_limit: got \[0\.1\], expected two numbers"),
        ({"time_step_limit": 0.1}, r"time_step_limit: got 0\.1, expected two numbers"),
        ({"time_step_limit": ["a", "b"]}, r"time_step_limit: got \['a', 'b'\], expected two numbers"),
        ({"num_experts_per_tok": 99}, r"num_experts_per_tok: got 99, expected at most the experts of topk_group groups, 6"),
        ({"num_experts_per_tok": 4, "n_group": 2}, r"num_experts_per_tok: got 4, expected at most the experts of topk_group groups, 3"),
        ({"n_group": 4}, r"n_routed_experts: got 6, expected a multiple of n_group, 4"),
        ({"topk_group": 0}, r"topk_group: got 0, expected a whole number from 1 on"),
        ({"topk_group": 2}, r"topk_group: got 2, expected at most n_group, 1"),
        ({"n_groups": 3}, r"mamba_num_heads: got 4, expected a multiple of n_groups, 3"),
        ({"num_key_value_heads": 3}, r"num_attention_heads: got 4, expected a multiple of num_key_value_heads, 3"),
    ],
)
def test_numbers_that_do_not_fit_each_other_are_named(change, words):
    with pytest.raises(CheckpointError, match=words):
        parse_config({**HYBRID, "hybrid_override_pattern": "ME*", **change})


def test_unknown_rope_scaling_is_refused_rather_than_ignored():
    with pytest.raises(CheckpointError, match="yarn"):
        parse_config({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}})


def test_no_config_is_a_missing_file(tmp_path):
    with pytest.raises(MissingFileError, match="config.json"):
        read_config(tmp_path)
