"""The bytes that one process of a layout is expected to hand to collectives in a step, from shapes alone: docs/parallelism.md as code.

The convention is that of `traffic`. Left out are scalars (counts, losses, norms: some tens of bytes) and the sizes that precede an all-to-all.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from nemotune.distributed import World
from nemotune.models import CausalLM
from nemotune.models.base import Head
from nemotune.models.layers import Embedding, GroupedLinear, Linear
from nemotune.models.nemotron_h import MoE

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Setting:
    """Steps of `rows` rows of `length` tokens, every second a target, on what this process of `world` holds of a model that computes in bf16."""

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
    """Once per step: what is trained and not divided by FSDP, in fp32; experts only where another process holds the same."""
    d = s.world.degrees
    if s.world.degree("data", "shard", "context") == 1:
        return {}
    bytes_ = 0
    for name, parameter in s.model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_divided = s.method == "full" and d.shard > 1 and _is_matrix(s.model, name)
        of_expert = ".experts." in name and d.expert > 1
        copies = (
            s.world.degree("data", "context")
            if is_divided
            else s.world.degree("data", "shard", "context") // (d.expert if of_expert else 1)
        )
        bytes_ += FP32 * _held(parameter) if copies > 1 else 0
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
    return {}


def _sent_rows(s: Setting) -> dict[str, int]:
    """Per micro batch and layer of experts: each token's row to each of its experts and back, in the forward and in the backward."""
    if s.world.degrees.expert == 1:
        return {}
    layers, config = sum(isinstance(module, MoE) for module in s.model.modules()), s.model.config
    width = config.moe_latent_size or config.hidden_size
    return {"all_to_all": s.num_micro_batches * layers * 4 * s.tokens * config.num_experts_per_tok * width * BF16}


def _context(s: Setting) -> dict[str, int]:
    return {}


def _stages(s: Setting) -> dict[str, int]:
    return {}


def _is_matrix(model: CausalLM, name: str) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    return isinstance(module, Linear | GroupedLinear | Embedding) and name.endswith(".weight")


def _held(parameter) -> int:
    return getattr(parameter, "_local_tensor", parameter).numel()
