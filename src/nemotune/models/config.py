"""The shape of a model, under one name for each size. How a config.json spells it is in `config_json.py`.

Only what the mathematics needs is kept; `raw` is the file as it was, and is written back untouched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemotune.ops.rope import Llama3Scaling


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What both families have."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    initializer_range: float
    rescale_prenorm_residual: bool
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    eos_token_id: tuple[int, ...]
    dtype: str  # of the checkpoint: what a model made from this config is saved in
    raw: dict[str, Any] = field(repr=False, compare=False)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The layers that have routed experts."""
        return ()


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """LlamaForCausalLM."""

    num_layers: int
    rope_theta: float
    rope_scaling: Llama3Scaling | float | None


@dataclass(frozen=True, kw_only=True)
class NemotronHConfig(ModelConfig):
    """NemotronHForCausalLM. Mamba's inner width is heads x head_dim, whatever `expand` says."""

    block_types: tuple[str, ...]  # mamba | attention | mlp | moe
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int
    chunk_size: int
    use_conv_bias: bool
    use_bias: bool
    time_step_limit: tuple[float, float]
    time_step_min: float
    time_step_max: float
    time_step_floor: float
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    moe_latent_size: int | None
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    @property
    def num_layers(self) -> int:
        return len(self.block_types)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        return tuple(index for index, block_type in enumerate(self.block_types) if block_type == "moe")

    @property
    def mamba_inner_size(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size
