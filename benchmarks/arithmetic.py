"""The bytes that one process of a layout is expected to hand to collectives in a step, from shapes alone: docs/parallelism.md as code.

The convention is that of `traffic`. Left out are scalars (counts, losses, norms: some tens of bytes) and the sizes that precede an all-to-all.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from nemotune.distributed import World, layouts_of, replicas
from nemotune.distributed.gradients import local
from nemotune.models import CausalLM, NemotronHConfig, llama, nemotron_h
from nemotune.models.base import Head
from nemotune.models.layers import AttentionCore, Embedding, GroupedLinear, Linear
from nemotune.models.nemotron_h import Mamba2, MoE

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Setting:
    """Steps of `rows` rows of `length` tokens, every second but the first a target, on what this process of `world` holds of a model that computes in bf16."""

    model: CausalLM
    world: World
    rows: int
    length: int
    method: str

    @property
    def num_micro_batches(self) -> int:
        return self.rows // self.world.degree("data", "shard")

    @property
    def tokens(self) -> int:
        """Of a micro batch, in this process."""
        return self.length // self.world.degrees.context

    @property
    def hidden_bytes(self) -> int:
        """Of the hidden states of a micro batch."""
        return self.tokens * self.model.config.hidden_size * BF16


def expected_bytes(s: Setting) -> dict[str, int]:
    """By kind of collective."""
    total: Counter[str] = Counter()
    for part in (_gradients(s), _sharded_weights(s), _tensor_regions(s), _sent_rows(s), _context(s), _stages(s)):
        total.update(part)
    return {kind: count for kind, count in total.items() if count}


def _gradients(s: Setting) -> dict[str, int]:
    """Once per step, in fp32: what is trained and another process holds too, having seen other tokens or computed other heads."""
    d, layouts, outside = s.world.degrees, layouts_of(s.model), replicas(s.model)
    bytes_ = 0
    for name, parameter in s.model.named_parameters():
        is_divided = s.method == "full" and d.shard > 1 and _is_matrix(s.model, name)
        of_expert = ".experts." in name and d.expert > 1
        copies = (
            s.world.degree("data", "context")
            if is_divided
            else s.world.degree("data", "shard", "context") // (d.expert if of_expert else 1)
        )
        if name not in outside and (layouts[name].is_whole or of_expert):
            copies *= d.tensor
        bytes_ += FP32 * local(parameter).numel() if parameter.requires_grad and copies > 1 else 0
    return {"all_reduce": bytes_}


def _sharded_weights(s: Setting) -> dict[str, int]:
    """Per micro batch: matrices of blocks gathered in bf16 for the forward and the backward; embeddings and head as they are held."""
    if s.world.degrees.shard == 1:
        return {}
    own = FP32 if s.method == "full" else BF16
    blocks = ends = 0
    for module in s.model.modules():
        if isinstance(module, GroupedLinear) and s.world.degrees.expert > 1:
            continue
        if isinstance(module, Head | Embedding):
            ends += module.weight.numel()
        elif isinstance(module, Linear | GroupedLinear):
            blocks += module.weight.numel()
    gathered = 2 * blocks * BF16 + ends * own
    scattered = (blocks + ends) * FP32 if s.method == "full" else 0
    return {"all_gather": s.num_micro_batches * gathered, "reduce_scatter": s.num_micro_batches * scattered}


def _tensor_regions(s: Setting) -> dict[str, int]:
    """Per micro batch: hidden states of each mixer, forward and backward, and of the embeddings; what the loss says of supervised tokens."""
    if s.world.degrees.tensor == 1:
        return {}
    mixers = sum(
        isinstance(module, Mamba2 | MoE | nemotron_h.Attention | nemotron_h.MLP | llama.Attention | llama.MLP)
        for module in s.model.modules()
    )
    mixers -= sum(isinstance(module, MoE) for module in s.model.modules())  # whose shared expert is no mixer of its own
    passes = 2 * mixers - (s.method == "lora")  # before the first adapter nothing has a gradient
    embedded = s.tokens * s.model.config.hidden_size * (FP32 if s.method == "full" else BF16)
    loss = (s.length // 2 - 1) * (12 + s.model.config.hidden_size * BF16)
    return {"all_reduce": s.num_micro_batches * (passes * s.hidden_bytes + embedded + loss)}


def _sent_rows(s: Setting) -> dict[str, int]:
    """Per micro batch and layer of experts: each token's row to each of its experts and back, in the forward and in the backward."""
    if s.world.degrees.expert == 1:
        return {}
    layers, config = sum(isinstance(module, MoE) for module in s.model.modules()), s.model.config
    width = config.moe_latent_size or config.hidden_size
    return {"all_to_all": s.num_micro_batches * layers * 4 * s.tokens * config.num_experts_per_tok * width * BF16}


def _context(s: Setting) -> dict[str, int]:
    """Per micro batch, a document: what a process is given of the pieces before its own, and the gradients that go back, mean of the processes."""
    ranks, config = s.world.degrees.context, s.model.config
    if ranks == 1:
        return {}
    before = s.length * (ranks - 1) / (2 * ranks)
    attention = (
        sum(isinstance(module, AttentionCore) for module in s.model.modules())
        * before
        * 2
        * config.num_key_value_heads
        * config.head_dim
        * BF16
    )
    mamba = 0.0
    if isinstance(config, NemotronHConfig):
        halo = (ranks - 1) / ranks * (config.conv_kernel - 1) * config.conv_dim * BF16
        states = (ranks - 1) / 2 * config.mamba_num_heads * (config.mamba_head_dim * config.ssm_state_size + 1) * FP32
        mamba = sum(isinstance(module, Mamba2) for module in s.model.modules()) * (halo + states)
    return {"all_to_all": round(2 * s.num_micro_batches * (attention + mamba))}


def _stages(s: Setting) -> dict[str, int]:
    """Per micro batch: hidden states over each cut, and their gradients back, mean of the stages."""
    stages = s.world.degrees.pipeline
    return {"send": s.num_micro_batches * 2 * s.hidden_bytes * (stages - 1) // stages}


def _is_matrix(model: CausalLM, name: str) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, Linear | GroupedLinear | Embedding) and name.endswith(".weight")
