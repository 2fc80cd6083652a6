"""What a machine could do, and what a computation asks of it: a large matrix product, and the products of a scan, of attention, of a step.

Two operations a multiply-add. What is computed again under activation checkpointing, and everything but products, is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemotune.data.loader import Batch
from nemotune.lora import apply_lora
from nemotune.models import NemotronHConfig, build_model
from nemotune.recipe import Lora


@dataclass(frozen=True)
class Clock:
    """How long a call is measured, and on what."""

    device: str
    seconds: float

    def medians(self, **calls: Callable[[], object]) -> dict[str, float]:
        """The median seconds of each call, made in turn; at least three of each, the first not counted."""
        found: dict[str, list[float]] = {name: [] for name in calls}
        while min(map(len, found.values())) < 4 or max(map(sum, found.values())) < self.seconds:
            for name, call in calls.items():
                started = self.now()
                call()
                found[name].append(self.now() - started)
        return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}

    def now(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def matmul_ceiling(clock: Clock, dtype: torch.dtype, *, size: int) -> float:
    """Operations a second of a square product of `size`."""
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    return 2 * size**3 / clock.medians(product=lambda: a @ b)["product"]


def scan_flops(c: Any, tokens: int) -> float:
    """Of one Mamba-2 scan in chunks, both ways (three times the forward). `c` has config.json's names."""
    scores = c.n_groups * 2 * c.chunk_size * c.ssm_state_size
    per_head = 2 * c.chunk_size * c.mamba_head_dim + 4 * c.mamba_head_dim * c.ssm_state_size  # within chunks; states in and out
    return 3 * tokens * (scores + c.mamba_num_heads * per_head)


def attention_flops(c: Any, lengths: Sequence[int]) -> float:
    """Of causal attention within documents, both ways: two products of L^2 / 2 each, three times the forward."""
    return 6 * c.num_attention_heads * c.head_dim * sum(length**2 for length in lengths)


def lora_step_flops(config: NemotronHConfig, lora: Lora, batch: Batch) -> float:
    """Of a LoRA step over `batch`. Full training is 6 operations per active parameter and token: 2 forward, 2 for the input's gradient,
    2 for the weight's. A frozen weight has no gradient of its own: 4. An adapter has all three: 6. Of E experts a token passes K; the
    head sees supervised tokens alone; embeddings are looked up."""
    model = build_model(config)
    apply_lora(model, lora)
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "conv1d" in name or "embeddings" in name:
            continue
        tokens = batch.num_supervised if "lm_head" in name else batch.num_tokens
        active = config.num_experts_per_tok / config.n_routed_experts if ".experts." in name else 1.0
        total += (6 if parameter.requires_grad else 4) * active * parameter.numel() * tokens
    lengths = batch.cu_seqlens.diff().tolist()
    scans, attentions = (config.block_types.count(kind) for kind in ("mamba", "attention"))
    return total + scans * scan_flops(config, batch.num_tokens) + attentions * attention_flops(config, lengths)
