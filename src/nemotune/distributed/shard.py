"""Weights divided along the `shard` axis by FSDP2: gathered for a block's forward and backward, gone in between.

Divided are the matrices of linear layers, experts and embeddings, which are cast to their input's dtype when they are used: they travel in the
compute dtype, and their gradients are added up in fp32. What is small and fp32 (norms, router, convolution, A_log, D, dt_bias) stays whole,
as do adapters, whose gradients are added once per step, and the head, which the loss uses in parts.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from nemotune.distributed.world import World
from nemotune.models import CausalLM
from nemotune.models.base import Head
from nemotune.models.layers import Embedding, GroupedLinear, Linear


def divide(module: nn.Module, world: World, *, compute_dtype: torch.dtype) -> None:
    """Divide the matrices of `module`, which holds its values, over the shard axis; nothing where that has one rank."""
    mesh = _mesh(world)
    if mesh is None:
        return
    kept = set(module.parameters()) - _matrices(module, with_experts=world.degrees.expert == 1)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    _sum(fully_shard(module, mesh=mesh, ignored_params=kept, mp_policy=policy))


def connect(model: CausalLM, world: World) -> None:
    """Divide the embeddings, and let the blocks gather one another's weights ahead of time."""
    mesh = _mesh(world)
    if mesh is None:
        return
    if isinstance(model.embeddings, Embedding) and model.embeddings.weight is not getattr(model.lm_head, "weight", None):
        divide(model.embeddings, world, compute_dtype=model.compute_dtype)
    _sum(fully_shard(model, mesh=mesh, ignored_params=set(model.parameters())))


def _mesh(world: World) -> DeviceMesh | None:
    return world.mesh["shard"] if world.degrees.shard > 1 else None


def _matrices(module: nn.Module, *, with_experts: bool) -> set[nn.Parameter]:
    kinds = (Linear, Embedding, GroupedLinear) if with_experts else (Linear, Embedding)
    return {found.weight for found in module.modules() if isinstance(found, kinds) and not isinstance(found, Head)}


def _sum(module: FSDPModule) -> None:
    """Gradients are sums over tokens: they are added, not averaged."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
