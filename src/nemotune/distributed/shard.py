"""Weights divided along the `shard` axis by FSDP2: gathered for a block's forward and backward, gone in between.

Divided are the matrices of linear layers, experts, embeddings and head. Those of blocks are cast to their input's dtype when they are used, so
they travel in it; gradients are added up in fp32. What is small and fp32 (norms, router, convolution, A_log, D, dt_bias) stays whole,
as do adapters, whose gradients are added once per step, and embeddings that are the head's too.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from nemotune.distributed.world import World
from nemotune.models import CausalLM
from nemotune.models.base import Head
from nemotune.models.layers import Embedding, GroupedLinear, Linear


def divide(module: nn.Module, world: World, *, compute_dtype: torch.dtype | None = None) -> None:
    """Divide the matrices of `module`, which holds its values, over the shard axis; nothing where that has one rank.

    They are gathered in `compute_dtype`, or in their own.
    """
    mesh = _mesh(world)
    if mesh is None:
        return
    kept = set(module.parameters()) - _matrices(module, with_experts=world.degrees.expert == 1)
    _sum(fully_shard(module, mesh=mesh, ignored_params=kept, mp_policy=_policy(compute_dtype)))


def connect(model: CausalLM, world: World) -> None:
    """Divide embeddings and head but where they are one tensor, and let the blocks gather one another's weights ahead of time.

    Both are gathered as they are held, since many tokens add to one row's gradient. The head is gathered with the model's own forward,
    stays until the loss is known, and is divided again in the backward.
    """
    mesh = _mesh(world)
    if mesh is None:
        return
    kept = set(model.parameters())
    if not model.config.tie_word_embeddings:
        if isinstance(model.embeddings, Embedding):
            divide(model.embeddings, world)
            cast(FSDPModule, model.embeddings).set_unshard_in_backward(False)  # a gradient of theirs needs no weight
        kept -= {module.weight for module in model.lm_head.modules() if isinstance(module, Head)}
    whole = fully_shard(model, mesh=mesh, ignored_params=kept, mp_policy=_policy(None))
    whole.set_unshard_in_backward(False)  # the loss has taken the head's gradients
    _sum(whole)
    register_fsdp_forward_method(model, "loss")


def divided(model: CausalLM, world: World) -> set[nn.Parameter]:
    """Which parameters of `model`, before adapters, `divide` and `connect` divide by rows, if they are called."""
    if world.degrees.shard == 1:
        return set()
    found = set().union(*(_matrices(block, with_experts=world.degrees.expert == 1) for block in model.blocks))
    if model.config.tie_word_embeddings:
        return found
    return found.union(model.embeddings.parameters(), model.lm_head.parameters())


def divide_again(model: CausalLM) -> None:
    """After forwards without a backward, which would have done it: until then the head's parameter is the whole one."""
    if isinstance(model, FSDPModule):
        model.reshard()


def _policy(compute_dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _mesh(world: World) -> DeviceMesh | None:
    return world.mesh["shard"] if world.degrees.shard > 1 else None


def _matrices(module: nn.Module, *, with_experts: bool) -> set[nn.Parameter]:
    kinds = (Linear, Embedding, GroupedLinear) if with_experts else (Linear, Embedding)
    return {found.weight for found in module.modules() if isinstance(found, kinds) and not isinstance(found, Head)}


def _sum(module: FSDPModule) -> None:
    """Gradients are sums over tokens: they are added, not averaged."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
