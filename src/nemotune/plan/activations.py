"""What the activations of a step take beside the weights: a formula of config, mode and tokens, as there is no batch yet to be measured.

A step over T tokens (`train.micro_batch_size` times `data.sequence_length`, at most) holds at its peak

    T * sum of kept(block) + max(head, largest of work(block))

- `kept`, bytes a token: under `none` every value that an operation's backward reads, once each; under `selective` the block's input and
  the outputs of its matrix products; under `full` the input alone, under `offload` nothing: the inputs are on the host. Inputs of linear layers that are not trained are in no gradient.
- `work`, one block's backward: under checkpointing its values of `none`, computed again; their gradients, as much once more; one weight
  widened from NF4, or those of the block cast from fp32; of Mamba, the states of its scan, one for every 64 tokens.
- `head`: a chunk of logits with its gradients, and the hidden states. The loss is taken when all of `kept` is there and no block works.

Left out: the ranks of adapters, what a library keeps for itself. benchmarks/qlora_memory.py measures whole steps against this.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from nemotune.models import CausalLM, LlamaConfig, NemotronHConfig
from nemotune.models.base import LOGITS_PER_CHUNK
from nemotune.models.quantize import widest_weight
from nemotune.ops.nf4 import AT_ONCE

__all__ = ["Activations", "kept_bytes"]

Mode = Literal["none", "selective", "full", "offload"]
FP32, PLACE = 4, 8  # bytes of a number and of an index
TOKENS_PER_STATE = 64


@dataclass(frozen=True)
class Activations:
    """The formula for one model: `trained` are its block types that LoRA or the method trains, `width` the bytes of a value."""

    model: CausalLM
    trained: Set[str]
    mode: Mode
    width: int
    device: str

    def peak_bytes(self, tokens: int) -> int:
        """What a step over `tokens` tokens holds on the device beside weights, gradients and optimiser."""
        kept = sum(tokens * kept_bytes(self.model.config, kind, self.trained, mode=self.mode, width=self.width) for kind in self._kinds)
        casts = [self._cast_bytes(block) for block in self.model.blocks]
        kept += sum(casts) if self.mode == "none" else 0
        work = max(self._work_bytes(kind, block, tokens) for kind, block in zip(self._kinds, self.model.blocks, strict=True))
        return kept + max(self._head_bytes(tokens), work + (0 if self.mode == "none" else max(casts)))

    def host_bytes(self, tokens: int) -> int:
        """The blocks' inputs, under `offload`."""
        return tokens * self.width * self.model.config.hidden_size * len(self._kinds) if self.mode == "offload" else 0

    @property
    def _kinds(self) -> tuple[str, ...]:
        config = self.model.config
        return config.block_types if isinstance(config, NemotronHConfig) else ("llama",) * config.num_layers

    def _work_bytes(self, kind: str, block: nn.Module, tokens: int) -> int:
        c = self.model.config
        again = kept_bytes(c, kind, self.trained, mode="none", width=self.width)
        size = tokens * again * (1 if self.mode == "none" else 2)
        if kind == "mamba":
            assert isinstance(c, NemotronHConfig)
            size += FP32 * tokens // TOKENS_PER_STATE * c.mamba_inner_size * c.ssm_state_size
        if weight := widest_weight(block):
            size += self.width * weight + 6 * min(weight, AT_ONCE[self.device == "cuda"])  # fp32, and codes as int32 for each two weights
        return size

    def _cast_bytes(self, block: nn.Module) -> int:
        """Trained weights are fp32, and cast for their products."""
        matrices = (p for name, p in block.named_parameters() if p.requires_grad and p.ndim > 1 and "lora_" not in name)
        return sum(p.numel() * self.width for p in matrices) if self.width < FP32 else 0

    def _head_bytes(self, tokens: int) -> int:
        """Logits, the same in fp32, their logarithms, both gradients; hidden states before and after the norm, and their gradients."""
        c = self.model.config
        chunk = min(tokens, max(1, LOGITS_PER_CHUNK[self.device == "cuda"] // c.vocab_size))
        gradients = sum(FP32 * p.numel() for p in self.model.lm_head.parameters() if p.requires_grad)
        return chunk * c.vocab_size * (2 * self.width + 3 * FP32) + 4 * tokens * c.hidden_size * self.width + gradients


def kept_bytes(config: NemotronHConfig | LlamaConfig, kind: str, trained: Set[str], *, mode: Mode, width: int) -> int:
    """Bytes a token that the forward of a block of `kind` keeps for its backward."""
    D = config.hidden_size
    if mode == "offload":
        return 0
    if mode == "full":
        return width * D
    values, products, others = KINDS[kind](config, trained)
    if mode == "selective":
        return width * (D + products) + (others if kind in ("attention", "llama") else 0)
    return width * (D + values) + others


# Each: values under `none` beside the block's input, outputs of matrix products, and bytes of what has a width of its own.
Kept = tuple[int, int, int]


def _linear(size_in: int, size_out: int, *, is_trained: bool) -> tuple[int, int]:
    """The input of a trained layer is kept under `none`, any layer's output under `selective`."""
    return (size_in if is_trained else 0), size_out


def _sum(*parts: tuple[int, int]) -> tuple[int, int]:
    return sum(values for values, _ in parts), sum(products for _, products in parts)


def _mamba(c: NemotronHConfig, trained: Set[str]) -> Kept:
    """z, what is convolved and dt; the convolution's output; the scan's. dt before and after softplus and clamp is fp32."""
    inner, projected = c.mamba_inner_size, c.mamba_inner_size + c.conv_dim + c.mamba_num_heads
    is_trained = "mamba" in trained
    values, products = _sum(_linear(c.hidden_size, projected, is_trained=is_trained), _linear(inner, c.hidden_size, is_trained=is_trained))
    return values + projected + c.conv_dim + inner, products, 3 * FP32 * c.mamba_num_heads


def _attention(c: NemotronHConfig | LlamaConfig, trained: Set[str]) -> Kept:
    """Queries, keys, values and the output, which is the input of `o_proj`; a normaliser a head is fp32."""
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    is_trained = "attention" in trained
    inputs = _linear(c.hidden_size, queries + 2 * keys, is_trained=is_trained)
    values, products = _sum(inputs, _linear(queries, c.hidden_size, is_trained=False))
    return values + 2 * queries + 2 * keys, products + queries, FP32 * c.num_attention_heads


def _mlp(c: NemotronHConfig, trained: Set[str], *, name: str = "mlp", size: int | None = None) -> Kept:
    """relu, and its square for a trained `down`."""
    size, is_trained = size or c.intermediate_size, name in trained
    values, products = _sum(_linear(c.hidden_size, size, is_trained=is_trained), _linear(size, c.hidden_size, is_trained=is_trained))
    return values + size, products, 0


def _moe(c: NemotronHConfig, trained: Set[str]) -> Kept:
    """Of each chosen expert relu, its square, the row it is sent and the one that comes back; scores, and the places of rows."""
    width, size, K = c.moe_latent_size or c.hidden_size, c.moe_intermediate_size, c.num_experts_per_tok
    up, down = (_linear(*sizes, is_trained="experts" in trained) for sizes in ((width, size), (size, width)))
    routed, products = _sum(up, down)
    shared, more, _ = _mlp(c, trained, name="shared_experts", size=c.moe_shared_expert_intermediate_size)
    values, products = K * (routed + size + width) + shared, K * products + more
    if c.moe_latent_size:
        inner, outer = (_linear(*sizes, is_trained="latent" in trained) for sizes in ((c.hidden_size, width), (width, c.hidden_size)))
        values, products = values + inner[0] * ("shared_experts" not in trained) + outer[0], products + inner[1] + outer[1]
    return values, products, FP32 * (c.n_routed_experts + 1) + K * (2 * FP32 + 3 * PLACE)


def _llama(c: LlamaConfig, trained: Set[str]) -> Kept:
    """The input of the second half, gate and up, silu of the gate, and the product for a trained `down`."""
    attention, products, others = _attention(c, trained)
    size, is_trained = c.intermediate_size, "mlp" in trained
    values, more = _sum(_linear(c.hidden_size, 2 * size, is_trained=is_trained), _linear(size, c.hidden_size, is_trained=is_trained))
    return attention + c.hidden_size + values + 3 * size, products + more, others


KINDS: dict[str, Callable[[Any, Set[str]], Kept]] = {"mamba": _mamba, "attention": _attention, "mlp": _mlp, "moe": _moe, "llama": _llama}
