"""Activation checkpointing: what the forward of a block keeps for the backward, against computing it again.

`none` keeps everything; `selective` keeps the outputs of a block's own matrix products and of attention, and computes the rest again;
`full` keeps only the input of each block; `offload` does too, in pinned host memory, from where the backward fetches it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nemotune.models import CausalLM
from nemotune.models.base import run_plainly
from nemotune.models.layers import Elsewhere

aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 2, aten.addmm.default: 3, aten._grouped_mm.default: 2}  # with the place after their factors
FEW = 16  # a product over so many times fewer values than it has columns is cheap: the B of an adapter, whose result is as wide as the layer's
KEPT = {
    aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
}  # fmt: skip


def set_activation_checkpointing(model: CausalLM, mode: str) -> None:
    """Make `model` run its blocks under `mode`: none, selective, full or offload."""
    if mode == "none":
        model.run_block = run_plainly
    elif mode == "full":
        model.run_block = _full
    elif mode == "offload":
        model.run_block = _offloaded
    else:
        model.run_block = partial(_full, context_fn=partial(create_selective_checkpoint_contexts, _keep_products))


def _full(block: nn.Module, *args: Any, **options: Any) -> Tensor:
    if not torch.is_grad_enabled() or isinstance(block, Elsewhere):
        return block(*args)
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **options)


def _offloaded(block: nn.Module, *args: Any) -> Tensor:
    """Outside of the block the hooks see what the checkpoint saves, its input: no weight, and nothing that is computed again."""
    with save_on_cpu(pin_memory=True):
        return _full(block, *args)


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in KEPT or operator.name() == "torch_attn::_varlen_attn"  # by name: it exists once attention on CUDA has run
    if operator in PRODUCTS:
        *_, left, right = args[: PRODUCTS[operator]]
        kept = FEW * left.shape[-1] > right.shape[-1]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
