"""A checkpoint's own config.json to the shape of its model (`config.py`), in every spelling that the published ones use."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotune.errors import CheckpointError, MissingFileError, UnsupportedError
from nemotune.models.config import LlamaConfig, NemotronHConfig
from nemotune.models.config_keys import ConfigKeys
from nemotune.ops.rope import Llama3Scaling

BLOCK_TYPES = {
    "M": "mamba", "*": "attention", "-": "mlp", "E": "moe",
    "mamba": "mamba", "mamba2": "mamba", "linear_attention": "mamba",
    "attention": "attention", "full_attention": "attention", "mlp": "mlp", "moe": "moe",
}  # fmt: skip
ROPE_KEYS = {
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip
PATTERN_KEYS = ("layers_block_type", "layer_types", "hybrid_override_pattern", "hybrid_layer_pattern")


def read_config(directory: Path) -> NemotronHConfig | LlamaConfig:
    """The config of the model in `directory`. Raises MissingFileError, CheckpointError, and UnsupportedError where it is quantised."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file; expected a Hugging Face model directory")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: got {type(raw).__name__}, expected an object as transformers writes it")
    return parse_config(raw, path)


def parse_config(raw: dict[str, Any], path: Path = Path("config.json")) -> NemotronHConfig | LlamaConfig:
    """The config that `raw` describes; `path` is for error messages."""
    readers = {"nemotron_h": _nemotron_h, "llama": _llama}
    model_type = raw.get("model_type")
    if model_type not in readers:
        raise CheckpointError(f"{path}: model_type: got {model_type!r}, expected one of {', '.join(readers)}")
    if quantized := raw.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UnsupportedError(f"{path}: quantization_config: got {method}; quantised checkpoints cannot be tuned, use the BF16 release")
    return readers[model_type](ConfigKeys(raw, path))


def _common(keys: ConfigKeys) -> dict[str, Any]:
    heads, hidden_size = keys.count("num_attention_heads"), keys.count("hidden_size")
    key_value_heads = keys.count("num_key_value_heads", default=heads)
    keys.require_multiple("num_attention_heads", heads, "num_key_value_heads", key_value_heads)
    eos = keys("eos_token_id", default=[])
    return {
        "vocab_size": keys.count("vocab_size"),
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": keys.count("head_dim", "attention_head_dim", default=hidden_size // heads),
        "norm_eps": keys("layer_norm_epsilon", "rms_norm_eps", "norm_eps", default=1e-5),
        "initializer_range": keys("initializer_range", default=0.02),
        "rescale_prenorm_residual": keys("rescale_prenorm_residual", default=True),
        "attention_bias": keys("attention_bias", default=False),
        "mlp_bias": keys("mlp_bias", default=False),
        "tie_word_embeddings": keys("tie_word_embeddings", default=False),
        "eos_token_id": (eos,) if isinstance(eos, int) else tuple(eos),
        "dtype": keys("dtype", "torch_dtype", default="bfloat16"),
        "raw": dict(keys.raw),
    }


def _llama(keys: ConfigKeys) -> LlamaConfig:
    keys.require("hidden_act", "silu", default="silu")
    rope = {**keys("rope_scaling", default={}), **keys("rope_parameters", default={})}
    return LlamaConfig(
        **_common(keys),
        intermediate_size=keys.count("intermediate_size"),
        num_layers=keys.count("num_hidden_layers"),
        rope_theta=float(rope.get("rope_theta") or keys("rope_theta", default=10000.0)),
        rope_scaling=_rope_scaling(rope, keys),
    )


def _rope_scaling(rope: Mapping[str, Any], keys: ConfigKeys) -> Llama3Scaling | float | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_KEYS:
        raise CheckpointError(f"{keys.path}: rope_scaling.rope_type: got {kind!r}, expected {', '.join(ROPE_KEYS)}")
    for name in ROPE_KEYS[kind]:
        if not isinstance(rope.get(name), int | float) or rope[name] <= 0:
            raise keys.unfit(f"rope_scaling.{name}", rope.get(name), f"a number over 0, as {kind} needs it")
    if kind == "llama3":
        return Llama3Scaling(*(rope[name] for name in ROPE_KEYS[kind]))
    return float(rope["factor"]) if kind == "linear" else None


def _nemotron_h(keys: ConfigKeys) -> NemotronHConfig:
    keys.require("mlp_hidden_act", "relu2", default="relu2")
    keys.require("mamba_hidden_act", "silu", default="silu")
    block_types = _block_types(keys)
    mamba_heads, n_groups = keys.count("mamba_num_heads"), keys.count("n_groups", "mamba_n_groups", "mamba_num_groups")
    keys.require_multiple("mamba_num_heads", mamba_heads, "n_groups", n_groups)
    return NemotronHConfig(
        **_common(keys),
        block_types=block_types,
        **_experts(keys, has_moe="moe" in block_types),
        intermediate_size=keys("intermediate_size", **({} if "mlp" in block_types else {"default": 0})),
        mamba_num_heads=mamba_heads,
        mamba_head_dim=keys.count("mamba_head_dim"),
        ssm_state_size=keys.count("ssm_state_size", "mamba_state_dim"),
        n_groups=n_groups,
        conv_kernel=keys.count("conv_kernel", "mamba_d_conv", default=4),
        chunk_size=keys.count("chunk_size", "mamba_chunk_size", default=128),
        use_conv_bias=keys("use_conv_bias", "mamba_conv_bias", default=True),
        use_bias=keys("use_bias", "mamba_proj_bias", default=False),
        time_step_limit=_time_step_limit(keys),
        time_step_min=keys("time_step_min", "mamba_dt_min", default=0.001),
        time_step_max=keys("time_step_max", "mamba_dt_max", default=0.1),
        time_step_floor=keys("time_step_floor", "mamba_dt_init_floor", default=1e-4),
    )


def _time_step_limit(keys: ConfigKeys) -> tuple[float, float]:
    limits = keys("time_step_limit", "mamba_dt_limit", default=[0.0, math.inf])
    if not isinstance(limits, list) or len(limits) != 2 or not all(isinstance(limit, int | float) for limit in limits):
        raise keys.unfit("time_step_limit", limits, "two numbers, the least and the most")
    return float(limits[0]), float(limits[1])


def _experts(keys: ConfigKeys, *, has_moe: bool) -> dict[str, Any]:
    experts = keys.count("n_routed_experts", "num_local_experts") if has_moe else 0
    per_token = keys.count("num_experts_per_tok") if has_moe else 0
    groups, top_groups = (keys.count(name, default=1) if has_moe else 1 for name in ("n_group", "topk_group"))
    keys.require_multiple("n_routed_experts", experts, "n_group", groups)
    if top_groups > groups:
        raise keys.unfit("topk_group", top_groups, f"at most n_group, {groups}")
    if per_token > (eligible := top_groups * experts // groups):
        raise keys.unfit("num_experts_per_tok", per_token, f"at most the experts of topk_group groups, {eligible}")
    return {
        "n_routed_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": keys.count("moe_intermediate_size") if has_moe else 0,
        "moe_shared_expert_intermediate_size": keys("moe_shared_expert_intermediate_size") if has_moe else 0,
        "moe_latent_size": keys("moe_latent_size", default=None),
        "n_group": groups,
        "topk_group": top_groups,
        "norm_topk_prob": keys("norm_topk_prob", default=True),
        "routed_scaling_factor": float(keys("routed_scaling_factor", default=1.0)),
    }


def _block_types(keys: ConfigKeys) -> tuple[str, ...]:
    """From a string (`|` between pipeline stages, what follows `/` belongs to MTP) or a list; as many as `num_hidden_layers` says."""
    spelled = keys(*PATTERN_KEYS)
    symbols = spelled.split("/")[0].replace("|", "") if isinstance(spelled, str) else spelled
    if unknown := [symbol for symbol in symbols if symbol not in BLOCK_TYPES]:
        raise CheckpointError(f"{keys.path}: unknown block type {unknown[0]!r}, expected M, *, - and E or mamba, attention, mlp and moe")
    if (num_layers := keys("num_hidden_layers", default=len(symbols))) != len(symbols):
        key = next(name for name in PATTERN_KEYS if keys.raw.get(name) is not None)
        blocks = "1 block" if len(symbols) == 1 else f"{len(symbols)} blocks"
        raise CheckpointError(
            f"{keys.path}: num_hidden_layers: got {num_layers}, but {key} has {blocks}; correct the one that does not fit the weights"
        )
    return tuple(BLOCK_TYPES[symbol] for symbol in symbols)
