"""`run_config.yaml`: how Megatron-Bridge is told which model a checkpoint holds; what both generations, 0.3 and 0.7, read.

The keys are those of its providers (megatron.bridge.models), the values follow from config.json.
"""

from __future__ import annotations

from typing import Any

from nemotune.export.megatron.homes import Config, mtp_pattern
from nemotune.models.config import LlamaConfig, NemotronHConfig
from nemotune.ops.rope import Llama3Scaling

SYMBOLS = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}


def run_config(config: Config, *, tokenizer: str, mtp_depth: int) -> dict[str, Any]:
    """The file's content. `tokenizer`: where the Hugging Face directory lies."""
    own = _llama(config) if isinstance(config, LlamaConfig) else _nemotron_h(config, mtp_depth)
    return {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "model": {**_common(config, tokenizer), **own},
        "checkpoint": {
            "_target_": "megatron.bridge.training.config.CheckpointConfig",
            "ckpt_format": "torch_dist", "fully_parallel_save": True, "save_optim": False, "save_rng": False,
        },
        "tokenizer": {
            "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
            "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": tokenizer,
        },
    }  # fmt: skip


def _common(config: Config, tokenizer: str) -> dict[str, Any]:
    return {
        "add_bias_linear": False,
        "bf16": config.dtype == "bfloat16",
        "fp16": config.dtype == "float16",
        "gradient_accumulation_fusion": False,
        "hf_model_id": tokenizer,
        "hidden_size": config.hidden_size,
        "kv_channels": config.head_dim,
        "layernorm_epsilon": config.norm_eps,
        "make_vocab_size_divisible_by": next(2**power for power in range(7, -1, -1) if config.vocab_size % 2**power == 0),
        "normalization": "RMSNorm",
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "num_query_groups": config.num_key_value_heads,
        "params_dtype": {"_call_": False, "_target_": f"torch.{config.dtype}"},
        "pipeline_model_parallel_size": 1,
        "seq_length": config.raw.get("max_position_embeddings", 8192),
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
        "tensor_model_parallel_size": 1,
        "vocab_size": config.vocab_size,
    }


def _llama(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    linear = {"seq_len_interpolation_factor": scaling} if isinstance(scaling, float) else {}
    return {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
        "ffn_hidden_size": config.intermediate_size,
        "gated_linear_unit": True,
        "position_embedding_type": "rope",
        "rope_scaling": isinstance(scaling, Llama3Scaling),
        "rope_scaling_factor": scaling.factor if isinstance(scaling, Llama3Scaling) else 8.0,
        "rotary_base": int(config.rope_theta) if config.rope_theta.is_integer() else config.rope_theta,
        "rotary_percent": 1.0,
        **linear,
    }


def _nemotron_h(config: NemotronHConfig, mtp_depth: int) -> dict[str, Any]:
    mtp = {"mtp_hybrid_override_pattern": "".join(SYMBOLS[block] for block in mtp_pattern(config))} if mtp_depth else {}
    return {
        "_target_": "megatron.bridge.models.mamba.mamba_provider.MambaModelProvider",
        "activation_func": {"_call_": False, "_target_": "megatron.core.activations.squared_relu"},
        "ffn_hidden_size": config.intermediate_size,
        "gated_linear_unit": False,
        "hybrid_override_pattern": "".join(SYMBOLS[block] for block in config.block_types),
        "is_hybrid_model": True,
        "mamba_head_dim": config.mamba_head_dim,
        "mamba_num_groups": config.n_groups,
        "mamba_num_heads": config.mamba_num_heads,
        "mamba_state_dim": config.ssm_state_size,
        "mtp_num_layers": mtp_depth,
        "position_embedding_type": "none",
        **mtp,
        **(_experts(config) if config.expert_layers else {}),
    }


def _experts(config: NemotronHConfig) -> dict[str, Any]:
    latent = {"moe_latent_size": config.moe_latent_size} if config.moe_latent_size else {}
    return {
        "moe_aux_loss_coeff": 0.0001,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_router_bias_update_rate": 0.001,
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "moe_router_group_topk": config.topk_group,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_router_num_groups": config.n_group,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_topk_scaling_factor": config.routed_scaling_factor,
        "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
        "moe_shared_expert_overlap": bool(config.raw.get("moe_shared_expert_overlap", True)),
        "moe_token_dispatcher_type": "alltoall",
        "num_moe_experts": config.n_routed_experts,
        **latent,
    }
