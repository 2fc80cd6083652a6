"""Small random models of both families, made and saved by transformers: what the parity tests compare with."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, NemotronHConfig, NemotronHForCausalLM

NEMOTRON = dict(
    vocab_size=96, hidden_size=32, head_dim=8, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=256,
    mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, n_groups=2, chunk_size=8, n_routed_experts=6, num_experts_per_tok=2,
    moe_intermediate_size=24, moe_shared_expert_intermediate_size=40, routed_scaling_factor=2.5,
)  # fmt: skip
LLAMA = dict(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=512,
    rope_parameters={"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
)  # fmt: skip
VARIANTS = {
    "hybrid": ("nemotron_h", dict(hybrid_override_pattern="ME*-ME", num_hidden_layers=6)),
    "one_group": ("nemotron_h", dict(hybrid_override_pattern="MM*", n_groups=1)),
    "groups_equal_heads": ("nemotron_h", dict(hybrid_override_pattern="M-M", n_groups=4)),
    "wide_heads": ("nemotron_h", dict(hybrid_override_pattern="M*M", mamba_head_dim=24, mamba_num_heads=6, n_groups=3)),
    "grouped_router": ("nemotron_h", dict(hybrid_override_pattern="EMEE", n_group=3, topk_group=2)),
    "unnormalised_router": ("nemotron_h", dict(hybrid_override_pattern="ME", norm_topk_prob=False)),
    "latent": ("nemotron_h", dict(hybrid_override_pattern="ME*E", moe_latent_size=16)),
    "four_ways": ("nemotron_h", dict(hybrid_override_pattern="ME*-E", moe_latent_size=16, mamba_num_heads=8, n_groups=4)),
    "no_conv_bias": ("nemotron_h", dict(hybrid_override_pattern="M*", use_conv_bias=False)),
    "llama": ("llama", {}),
    "llama_plain_rope": ("llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})),
    "llama_tied": ("llama", dict(tie_word_embeddings=True)),
    "llama_biased": ("llama", dict(attention_bias=True, mlp_bias=True)),
}


def make(variant: str, **more: object):
    """A random transformers model of the variant, `more` of its config changed; wide enough initial values that every part of it matters."""
    family, changes = VARIANTS[variant]
    changes = {**changes, **more}
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))
    else:
        model = NemotronHForCausalLM(NemotronHConfig(**{**NEMOTRON, **changes}))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("A_log"):
                tensor.uniform_(0.0, 1.5)
            elif name.endswith(("e_score_correction_bias", "dt_bias")):
                tensor.normal_(0, 0.5)
            elif tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.2)
            else:
                tensor.normal_(0, 0.15)
    return model.eval()


def with_our_dt_limits(model):
    """transformers clamps dt at time_step_min, mamba-ssm and Megatron at time_step_limit: set it alike."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = tuple(model.config.time_step_limit)
    return model


def relative(ours, theirs):
    """The largest difference, in units of the reference's largest magnitude."""
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()
