"""Tensor parallelism: how the ranks of the `tensor` axis, each with its part of the weights (`tensor.py`), compute one model.

A mixer (llama: self_attn, mlp) is one region. What enters it is the same on all ranks and what each makes of it a term of a sum, so its output is
summed over the ranks, and in the backward the gradient of its input: one all-reduce each way. The gradients of weights that a region
holds whole (router, latent projections, A of adapters) are terms of a sum too, which `gradients.py` adds up.

The head is a region whose logits, of a part of the vocabulary, are never gathered: the loss needs the ranks' maximum and sums alone.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nemotune.distributed.world import World
from nemotune.models import CausalLM
from nemotune.models.layers import Embedding
from nemotune.models.nemotron_h import Router
from nemotune.ops.experts import Routing

MIXERS = {"nemotron_h": r".*\.layers\.\d+\.mixer", "llama": r".*\.layers\.\d+\.(self_attn|mlp)"}
HEAD = "lm_head"


def regions(model: CausalLM) -> dict[str, nn.Module]:
    """The mixers and the head, as far as they are here, by name."""
    pattern = f"{MIXERS[model.family]}|{HEAD}"
    return {name: module for name, module in model.named_modules() if re.fullmatch(pattern, name)}


def connect(model: CausalLM, world: World) -> None:
    """Sum what the regions give and the gradients of what they take. Every process calls it at the same time."""
    if world.degrees.tensor == 1:
        return
    group, index = world.group("tensor"), world.index("tensor")
    for name, region in regions(model).items():
        region.register_forward_pre_hook(partial(_enter, group=group))
        if name != HEAD:
            region.register_forward_hook(partial(_leave, group=group))
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(partial(_share_scores, degree=world.degrees.tensor))
    for name, module in [*model.named_modules()]:
        if module is model.embeddings and isinstance(module, Embedding):
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, VocabularyEmbedding(module, index, group))
    model.softmax_loss = partial(softmax_loss, index=index, group=group)


def _enter(region: nn.Module, inputs: tuple[Any, ...], *, group: Any) -> tuple[Any, ...]:
    return _SumGradient.apply(inputs[0], group), *inputs[1:]


def _leave(region: nn.Module, inputs: tuple[Any, ...], output: Tensor, *, group: Any) -> Tensor:
    return _Sum.apply(output, group)  # type: ignore[no-any-return]


def _share_scores(router: Router, inputs: tuple[Tensor], routing: Routing, *, degree: int) -> Routing:
    """A loss on the scores is computed by every rank, and its gradients are summed: each gives its share."""
    assert routing.scores_TE is not None
    return replace(routing, scores_TE=_ShareGradient.apply(routing.scores_TE, degree))


class _SumGradient(torch.autograd.Function):
    """x as it is; the sum of its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _summed(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum of the ranks' y; its gradient is that of each."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        return _summed(y, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _ShareGradient(torch.autograd.Function):
    """x as it is; an equal share of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, degree: int) -> Tensor:
        ctx.degree = degree
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad / ctx.degree, None


def _summed(x: Tensor, group: Any) -> Tensor:
    """In memory of its own: selective checkpointing keeps what products give."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class VocabularyEmbedding(Embedding):
    """Embeddings of which each rank holds an equal range of rows; takes over the weight of `held`."""

    def __init__(self, held: Embedding, index: int, group: Any):
        super().__init__(*held.weight.shape, device="meta")
        self.weight, self.part, self.index, self.group = held.weight, held.part, index, group

    def forward(self, tokens_T: Tensor) -> Tensor:
        rows_T, is_here_T = _places(tokens_T, self.index, self.num_embeddings)
        return _Sum.apply(F.embedding(rows_T, self.weight) * is_here_T.unsqueeze(-1), self.group)  # type: ignore[no-any-return]


def softmax_loss(logits_NV: Tensor, targets_N: Tensor, *, with_gradient: bool, index: int, group: Any) -> Tensor:
    """A SoftmaxLoss over the logits of an equal range of the vocabulary on each rank: the whole loss, the gradient of those logits."""
    top_N1 = logits_NV.amax(-1, keepdim=True)
    dist.all_reduce(top_N1, op=dist.ReduceOp.MAX, group=group)
    places_N, is_here_N = _places(targets_N, index, logits_NV.shape[1])
    places_N1, is_here_N1 = places_N.unsqueeze(-1), is_here_N.unsqueeze(-1)
    shifted_NV = logits_NV.sub_(top_N1)
    target_N1 = shifted_NV.gather(1, places_N1) * is_here_N1
    exp_NV = shifted_NV.exp_()
    sums_2N1 = torch.stack((exp_NV.sum(-1, keepdim=True), target_N1))
    dist.all_reduce(sums_2N1, group=group)
    normaliser_N1, target_N1 = sums_2N1
    if with_gradient:
        exp_NV.div_(normaliser_N1).scatter_add_(1, places_N1, -is_here_N1.to(exp_NV.dtype))
    return (normaliser_N1.log() - target_N1).sum()


def _places(tokens: Tensor, index: int, size: int) -> tuple[Tensor, Tensor]:
    """Where each token lies in the `index`th range of `size` of the vocabulary, and whether it does; else the place is 0."""
    places = tokens - index * size
    is_here = (places >= 0) & (places < size)
    return places * is_here, is_here
