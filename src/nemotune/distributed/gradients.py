"""Gradients of all processes added up once per step, and their norm, in which every element of the whole model counts once.

Gradients are sums over tokens, so those of processes that hold the same part of a parameter are added, never averaged. FSDP has by
then added those of the rows that it divides. Which processes hold the same part follows from the layouts alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemotune.distributed.world import TOKENS, World
from nemotune.recipe.degrees import AXES
from nemotune.weights.layout import Layout

BUCKET = 2**26  # values added up by one call: 256 MB of fp32


class Gradients:
    """The gradients of `parameters`, of each of which this process holds `layouts[name]`.

    `replicas` names those that every tensor rank computes whole, from the same activations: their gradients are equal already.
    Every process makes one, at the same time.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], layouts: Mapping[str, Layout], *, replicas: Collection[str] = (), world: World
    ):
        self.parameters, self.world = dict(parameters), world
        held = world.gather({name: (layouts[name], name in replicas) for name in self.parameters})
        elements: Counter[str] = Counter()
        for of_rank in held:
            elements.update({name: layout.numel for name, (layout, _) in of_rank.items()})
        self.copies = {name: elements[name] / math.prod(layouts[name].shape) for name in self.parameters}  # processes that hold an element
        self.together: dict[tuple[int, ...], list[str]] = {}  # ranks whose gradients are added -> parameters
        for name in sorted(self.parameters):
            self.together.setdefault(self._same_part(name, held), []).append(name)
        if world.size > 1:
            world.make_groups(ranks for ranks in self.together if len(ranks) > 1)

    def reduce(self) -> None:
        """Add up each parameter's gradient over the processes that hold the same part; one that is missing counts as zero."""
        for ranks in sorted(self.together):
            if len(ranks) == 1:
                continue
            for bucket in _buckets([local(self._gradient(name)) for name in self.together[ranks]]):
                _add_up(bucket, self.world.group_of(ranks))

    def norm(self) -> float:
        """The L2 norm of all gradients together, summed in fp64."""
        there = {name: p for name, p in self.parameters.items() if p.grad is not None}
        copies = torch.tensor([self.copies[name] for name in there], dtype=torch.float64)
        squares = _squares(there.values()).to(self.world.device) / copies.to(self.world.device, non_blocking=True)
        return self.world.sum(squares.sum(), *AXES).sqrt().item()

    def _same_part(self, name: str, held: Sequence[Mapping[str, tuple[Layout, bool]]]) -> tuple[int, ...]:
        """The ranks whose gradients of `name` are terms of the same sum."""
        mine, is_replica = held[self.world.rank][name]
        along = self.world.ranks("pipeline", *TOKENS) if is_replica else range(self.world.size)
        return tuple(rank for rank in along if name in held[rank] and held[rank][name][0] == mine)

    def _gradient(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The L2 norm of all gradients together, in one process."""
    return _squares(parameters).sum().sqrt().item()


def _squares(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The square of the norm of each gradient that is there, fp64."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).double().square() if gradients else torch.zeros(0, dtype=torch.float64)


def local(tensor: Tensor) -> Tensor:
    """The values that this process holds of a tensor that FSDP may have divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _add_up(bucket: Sequence[Tensor], group: Any) -> None:
    """Each of the tensors summed over `group`, in one call and in place. One alone, which may be large, is not copied."""
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0], group=group)
        return
    flat = torch.cat([tensor.flatten() for tensor in bucket])
    dist.all_reduce(flat, group=group)
    for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(total.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, so many to a list that they are at most BUCKET values, or one."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
