"""The keys of a GGUF file: what the model is, in the words that llama.cpp reads its shape from. The tokenizer's are in `tokenizer.py`.

Keys and values are those of convert_hf_to_gguf.py (ggml 0.25.3), apart from its mistakes: experts are told of where there are some.
"""

from __future__ import annotations

from dataclasses import fields
from datetime import date
from pathlib import Path

from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, LlamaFileType, Metadata, RopeScalingType, size_label

from nemotune.export.gguf.dense import expert_width
from nemotune.models.config import LlamaConfig, NemotronHConfig

HYBRID_CONTEXT = 2**20  # what llama.cpp is told of every hybrid model: the recurrent state has no limit


def add_metadata(
    writer: GGUFWriter, config: NemotronHConfig | LlamaConfig, directory: Path, file_type: LlamaFileType, *, name: str | None
) -> None:
    """Everything but the tokenizer; the writer knows the tensors. `name` is the model's own, else it comes from `directory` and its card."""
    _add_general(writer, directory, name)
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if isinstance(config, LlamaConfig):
        _add_llama(writer, config)
    else:
        _add_hybrid(writer, config)
        if config.expert_layers:
            _add_experts(writer, config)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_general(writer: GGUFWriter, directory: Path, name: str | None) -> None:
    """Name, licence, authors and sampling settings, from the model's card and directory as the `gguf` package finds them."""
    total, shared, expert, num_experts = writer.get_total_parameter_count()
    found = Metadata.load(None, directory, name, total)
    found.name = found.name or directory.name
    found.size_label = found.size_label or size_label(total, shared, expert, num_experts)
    for field in fields(found):
        value = getattr(found, field.name)
        if field.type == "Optional[str]" and isinstance(value, int | float | date):
            setattr(found, field.name, str(value))  # YAML makes a number of `version: 1.0`
    writer.add_type(GGUFType.MODEL)
    found.set_gguf_meta_model(writer)


def _add_llama(writer: GGUFWriter, config: LlamaConfig) -> None:
    writer.add_context_length(config.raw.get("max_position_embeddings", 2048))  # transformers' default
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if isinstance(config.rope_scaling, float):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling)


def _add_hybrid(writer: GGUFWriter, config: NemotronHConfig) -> None:
    """A layer without key-value heads and without a feed-forward width is recurrent."""
    width = config.moe_intermediate_size if config.expert_layers else config.intermediate_size
    writer.add_context_length(HYBRID_CONTEXT)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_feed_forward_length([width if kind in ("mlp", "moe") else 0 for kind in config.block_types])
    writer.add_head_count_kv([config.num_key_value_heads if kind == "attention" else 0 for kind in config.block_types])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_scaling_finetuned(False)  # no RoPE
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_state_size(config.ssm_state_size)
    writer.add_ssm_group_count(config.n_groups)
    writer.add_ssm_inner_size(config.mamba_inner_size)
    writer.add_ssm_time_step_rank(config.mamba_num_heads)


def _add_experts(writer: GGUFWriter, config: NemotronHConfig) -> None:
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    widths = [expert_width(config) if kind == "mlp" else config.moe_intermediate_size for kind in config.block_types]
    if len(set(widths)) == 1:
        writer.add_expert_feed_forward_length(widths[0])
    else:
        writer.add_array(f"{writer.arch}.expert_feed_forward_length", widths)
    writer.add_expert_shared_feed_forward_length(config.moe_shared_expert_intermediate_size)
    writer.add_expert_shared_count(1)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.moe_latent_size:
        writer.add_moe_latent_size(config.moe_latent_size)
