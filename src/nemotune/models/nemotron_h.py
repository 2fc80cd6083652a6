"""Nemotron-H (arXiv 2504.03624) and Nemotron 3: blocks of Mamba-2, attention, MLP or mixture of experts, one mixer each.

What is special: attention has no position embedding (Mamba carries order); MLPs and experts are not gated, their activation is
relu squared; experts may work in a latent space; A_log, D, dt_bias and the router's correction bias stay fp32. Module names are
the checkpoint's. Parallel runs swap the named parameterless parts: `mixer.conv`, `mixer.scan`, `mixer.core`, `experts.dispatch`.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotune.models.base import CausalLM, Head
from nemotune.models.cache import KVState, MambaState
from nemotune.models.config import NemotronHConfig
from nemotune.models.layers import AttentionCore, Embedding, GroupedLinear, Linear, RMSNorm
from nemotune.ops.conv import causal_conv1d, causal_conv1d_step, conv_state
from nemotune.ops.documents import Documents
from nemotune.ops.experts import Dispatch, Routing, dispatch, route
from nemotune.ops.norm import gated_group_rms_norm
from nemotune.ops.ssd import ssd
from nemotune.ops.ssd_ref import ssd_step
from nemotune.weights import Stack


class NemotronH(CausalLM):
    """The whole model: `forward` gives hidden states, `logits` the head's output."""

    family = "nemotron_h"
    stacks = (Stack(r"(.*\.mixer\.experts)\.((?:up|down)_proj\.weight)"),)
    fp32_parameters = ("A_log", "D", "dt_bias", "e_score_correction_bias")
    aliases = {"model.": "backbone."}
    linear_blocks = {
        "attention": r"\.mixer\.[qkvo]_proj",
        "mamba": r"\.mixer\.(in|out)_proj",
        "mlp": r"\.mixer\.(up|down)_proj",
        "shared_experts": r"\.mixer\.shared_experts\.(up|down)_proj",
        "experts": r"\.mixer\.experts\.(up|down)_proj",
        "latent": r"\.mixer\.fc[12]_latent_proj",
    }

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)

    @property
    def embeddings(self) -> nn.Embedding:
        return self.backbone.embeddings

    @property
    def blocks(self) -> nn.ModuleList:
        return self.backbone.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.backbone.norm_f

    def new_layer_state(self, index: int, batch_size: int, max_length: int) -> KVState | MambaState | None:
        block_type = self.config.block_types[index]
        if block_type == "mamba":
            return MambaState()
        if block_type == "attention":
            return KVState(
                batch_size, max_length, self.config.num_key_value_heads, self.config.head_dim, dtype=self.compute_dtype, device=self.device
            )
        return None


class Backbone(nn.Module):
    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self.embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, block_type) for block_type in config.block_types)
        self.norm_f = RMSNorm(config.hidden_size, config.norm_eps)


class Block(nn.Module):
    """`x + mixer(norm(x))`."""

    def __init__(self, config: NemotronHConfig, block_type: str):
        super().__init__()
        self.block_type = block_type
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = MIXERS[block_type](config)

    def forward(self, x_TD: Tensor, documents: Documents, rope: None, state: KVState | MambaState | None = None) -> Tensor:
        normed_TD = self.norm(x_TD)
        if self.block_type in ("mamba", "attention"):
            return x_TD + self.mixer(normed_TD, documents, state)
        return x_TD + self.mixer(normed_TD)


class Mamba2(nn.Module):
    """Mamba-2 (arXiv 2405.21060): projection, short convolution, selective state space, gated group norm, projection."""

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self.config = config
        inner, heads = config.mamba_inner_size, config.mamba_num_heads
        self.in_proj = Linear(config.hidden_size, inner + config.conv_dim + heads, bias=config.use_bias)
        self.conv1d = nn.Conv1d(config.conv_dim, config.conv_dim, config.conv_kernel, groups=config.conv_dim, bias=config.use_conv_bias)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm = RMSNorm(inner, config.norm_eps)
        self.out_proj = Linear(inner, config.hidden_size, bias=config.use_bias)
        self.conv = CausalConv()
        self.scan = Scan(config.chunk_size)

    def forward(self, x_TD: Tensor, documents: Documents, state: MambaState | None = None) -> Tensor:
        c = self.config
        # order: [z, x, B, C, dt], the convolution runs over x, B and C
        z_TI, xBC_TC, dt_TN = self.in_proj(x_TD).split([c.mamba_inner_size, c.conv_dim, c.mamba_num_heads], dim=-1)
        xBC_TC = self.conv(xBC_TC, self.conv1d, documents, state)
        x_TI, B_TX, C_TX = xBC_TC.split([c.mamba_inner_size, c.n_groups * c.ssm_state_size, c.n_groups * c.ssm_state_size], dim=-1)
        dt_TN = F.softplus(dt_TN.float() + self.dt_bias.float()).clamp(*c.time_step_limit)  # fp32: softplus in bf16 drifts from the kernel
        y_TNP = self.scan(
            x_TI.unflatten(-1, (c.mamba_num_heads, -1)), dt_TN, -self.A_log.float().exp(),
            B_TX.unflatten(-1, (c.n_groups, -1)), C_TX.unflatten(-1, (c.n_groups, -1)), self.D, documents, state,
        )  # fmt: skip
        y_TI = gated_group_rms_norm(y_TNP.flatten(-2), z_TI, self.norm.weight, num_groups=c.n_groups, eps=c.norm_eps)
        return self.out_proj(y_TI)


class CausalConv(nn.Module):
    """The convolution over a packed row, or one step of it; `conv1d` holds the weights."""

    def forward(self, x_TC: Tensor, conv1d: nn.Conv1d, documents: Documents, state: MambaState | None) -> Tensor:
        weight_CW = conv1d.weight.squeeze(1)
        if state is not None and state.conv_BWC is not None:
            y_BC, state.conv_BWC = causal_conv1d_step(x_TC, state.conv_BWC, weight_CW, conv1d.bias)
            return y_BC
        if state is not None:
            state.conv_BWC = conv_state(x_TC, weight_CW.shape[1], documents)
        return causal_conv1d(x_TC, weight_CW, conv1d.bias, documents)


class Scan(nn.Module):
    """The selective state space over a packed row, or one step of it."""

    def __init__(self, chunk_size: int):
        super().__init__()
        self.chunk_size = chunk_size

    def forward(
        self,
        x_TNP: Tensor,
        dt_TN: Tensor,
        A_N: Tensor,
        B_TGS: Tensor,
        C_TGS: Tensor,
        D_N: Tensor,
        documents: Documents,
        state: MambaState | None,
    ) -> Tensor:
        if state is not None and state.ssm_BNPS is not None:
            y_BNP, state.ssm_BNPS = ssd_step(x_TNP, dt_TN, A_N, B_TGS, C_TGS, D_N, state.ssm_BNPS)
            return y_BNP
        y_TNP, final = ssd(x_TNP, dt_TN, A_N, B_TGS, C_TGS, D_N, documents, chunk_size=self.chunk_size, final_states=state is not None)
        if state is not None:
            state.ssm_BNPS = final
        return y_TNP


class Attention(nn.Module):
    """Grouped-query attention without positions."""

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self.head_dim = config.head_dim
        query_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.core = AttentionCore()

    def forward(self, x_TD: Tensor, documents: Documents, state: KVState | None = None) -> Tensor:
        q, k, v = (proj(x_TD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.core(q, k, v, documents, state).flatten(-2))


class MLP(nn.Module):
    """`down(relu(up(x))^2)`."""

    def __init__(self, config: NemotronHConfig, intermediate_size: int | None = None):
        super().__init__()
        width = intermediate_size or config.intermediate_size
        self.up_proj = Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x_TD)).square())


class MoE(nn.Module):
    """Routed experts, in a latent space where the config has one, plus a shared expert that every token passes."""

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config, config.moe_shared_expert_intermediate_size)
        self.has_latent = config.moe_latent_size is not None
        if self.has_latent:
            latent = cast(int, config.moe_latent_size)
            self.fc1_latent_proj = Linear(config.hidden_size, latent, bias=config.mlp_bias)
            self.fc2_latent_proj = Linear(latent, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        routing = self.gate(x_TD)
        if self.has_latent:
            y_TD = self.fc2_latent_proj(self.experts(self.fc1_latent_proj(x_TD), routing))
        else:
            y_TD = self.experts(x_TD, routing)
        return y_TD + self.shared_experts(x_TD)


class Router(nn.Module):
    """Sigmoid top-k within the best groups. The correction bias is a buffer: no optimiser ever sees it."""

    e_score_correction_bias: Tensor

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.empty(config.n_routed_experts))

    def forward(self, x_TD: Tensor) -> Routing:
        c = self.config
        return route(
            x_TD, self.weight, self.e_score_correction_bias,
            top_k=c.num_experts_per_tok, num_groups=c.n_group, top_groups=c.topk_group, normalize=c.norm_topk_prob, scale=c.routed_scaling_factor,
        )  # fmt: skip


class Experts(nn.Module):
    """Non-gated experts over tokens sorted by expert."""

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        width = config.moe_latent_size or config.hidden_size
        self.up_proj = GroupedLinear(config.n_routed_experts, width, config.moe_intermediate_size)
        self.down_proj = GroupedLinear(config.n_routed_experts, config.moe_intermediate_size, width)
        self.dispatch = Dispatcher(config.n_routed_experts)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        sent = self.dispatch(routing)
        h_MF = F.relu(self.up_proj(sent.sorted_rows(x_TD), sent)).square()
        return sent.combine(self.down_proj(h_MF, sent))


class Dispatcher(nn.Module):
    """Sorts tokens by expert; all experts are here."""

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, routing: Routing) -> Dispatch:
        return dispatch(routing, self.num_experts)


MIXERS: dict[str, type[nn.Module]] = {"mamba": Mamba2, "attention": Attention, "mlp": MLP, "moe": MoE}
