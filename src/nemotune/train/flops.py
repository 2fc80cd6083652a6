"""What the mathematics of a training step needs in floating point operations, and how many a GPU can do.

Counted are the matrix products, 2 operations for each multiplication with its addition, once in the forward, and in the backward once for
the gradient of the input and once for that of the weight, which frozen weights do not need. A token's experts are those that it is sent to;
the output head sees supervised positions alone; attention is causal and stops at the borders of documents: a document of L tokens has
L (L + 1) / 2 pairs of query and key; Mamba is its recurrence, `B x` added to the state and `C h` read from it. Not counted: what activation
checkpointing computes again, what chunks and padding add, convolutions, norms and whatever else is no product. Gradients are taken to
pass all blocks, also those below the first adapter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from nemotune.data.loader import Batch
from nemotune.lora import LoRAEmbedding
from nemotune.lora.layers import LoRALayer
from nemotune.models import CausalLM, NemotronHConfig
from nemotune.models.layers import AttentionCore, GroupedLinear
from nemotune.models.nemotron_h import Router, Scan

FROZEN, TRAINED = 4, 6  # operations for each weight and token
# NVIDIA's data sheets: bf16 on tensor cores without sparsity, TFLOP/s. The first whose words are in a device's name counts.
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "GH200": 989, "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H800": 989,
    "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A30": 165,
}  # fmt: skip


@dataclass(frozen=True)
class Flops:
    """Forward and backward: operations for each token, for each supervised one on top, and for each pair of query and key."""

    per_token: int
    per_target: int
    per_pair: int

    @classmethod
    def of(cls, model: CausalLM) -> Flops:
        """Of `model` with what is trained in it; it may lie on the meta device."""
        config, modules = model.config, list(model.modules())
        head = set(model.lm_head.modules())
        scans, cores = (sum(isinstance(module, kind) for module in modules) for kind in (Scan, AttentionCore))
        recurrence = config.mamba_inner_size * config.ssm_state_size if isinstance(config, NemotronHConfig) else 0
        return cls(
            per_token=sum(_of_products(module, model) for module in modules if module not in head) + 2 * TRAINED * scans * recurrence,
            per_target=sum(_of_products(module, model) for module in head),
            per_pair=2 * TRAINED * cores * config.num_attention_heads * config.head_dim,
        )

    def of_batches(self, batches: Iterable[Batch]) -> int:
        """Of a step over `batches`."""
        return sum(
            self.per_token * batch.num_tokens + self.per_target * batch.num_supervised + self.per_pair * num_pairs(batch)
            for batch in batches
        )


def num_pairs(batch: Batch) -> int:
    """Pairs of query and key, each key being its query or before it in the same document."""
    lengths = batch.cu_seqlens.diff().long()
    return int((lengths * (lengths + 1) // 2).sum())


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the device can do at most, where that is known: of some GPUs, in bf16."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for known, peak in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def _of_products(module: nn.Module, model: CausalLM) -> int:
    """The products with this module's own weights, for a token."""
    if isinstance(module, nn.Linear | GroupedLinear):
        weight = getattr(module, "weight", None)  # NF4 has none
        experts = _experts_per_token(model) if isinstance(module, GroupedLinear) else 1
        is_trained = weight is not None and weight.requires_grad
        return (TRAINED if is_trained else FROZEN) * module.in_features * module.out_features * experts
    if isinstance(module, Router):
        return (TRAINED if module.weight.requires_grad else FROZEN) * module.weight.numel()
    if isinstance(module, LoRAEmbedding):
        return TRAINED * module.lora_embedding_B.numel()
    if isinstance(module, LoRALayer):
        ranks = module.lora_A.shape[-2] * (module.in_features + module.out_features)
        return TRAINED * ranks * (_experts_per_token(model) if isinstance(module.base, GroupedLinear) else 1)
    return 0


def _experts_per_token(model: CausalLM) -> int:
    assert isinstance(model.config, NemotronHConfig)
    return model.config.num_experts_per_tok
