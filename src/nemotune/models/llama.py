"""Llama 3.1 (arXiv 2407.21783) and the Llama-Nemotron models built on it: attention with rotary positions, gated MLP.

What is special: llama3 frequency scaling, head_dim that need not be hidden_size / heads (Nano-4B), embeddings that may be tied.
Module names are the checkpoint's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nemotune.models.base import CausalLM, Head
from nemotune.models.cache import KVState
from nemotune.models.config import LlamaConfig
from nemotune.models.layers import AttentionCore, Embedding, Linear, RMSNorm
from nemotune.ops.documents import Documents
from nemotune.ops.rope import apply_rope, rope_frequencies, rotary


class Llama(CausalLM):
    """The whole model: `forward` gives hidden states, `logits` the head's output."""

    family = "llama"
    linear_blocks = {"attention": r"\.self_attn\.[qkvo]_proj", "mlp": r"\.mlp\.(gate|up|down)_proj"}

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self._frequencies: Tensor | None = None  # no buffer: casts of the model leave it fp32, and no checkpoint has it

    @property
    def embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.model.norm

    def rope(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        if self._frequencies is None or self._frequencies.device != positions_T.device:  # computed on the CPU, copied once
            frequencies = rope_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
            self._frequencies = frequencies.to(positions_T.device)
        return rotary(positions_T, self._frequencies)

    def new_layer_state(self, index: int, batch_size: int, max_length: int) -> KVState:
        c = self.config
        return KVState(batch_size, max_length, c.num_key_value_heads, c.head_dim, dtype=self.compute_dtype, device=self.device)


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_TD: Tensor, documents: Documents, rope: tuple[Tensor, Tensor], state: KVState | None = None) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), documents, rope, state)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        query_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.core = AttentionCore()

    def forward(self, x_TD: Tensor, documents: Documents, rope: tuple[Tensor, Tensor], state: KVState | None = None) -> Tensor:
        q, k, v = (proj(x_TD).unflatten(-1, (-1, self.config.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.core(apply_rope(q, *rope), apply_rope(k, *rope), v, documents, state).flatten(-2))


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))
