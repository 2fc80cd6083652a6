"""Whole tensors in the first process, one at a time, from the parts that all hold: what a writer of files asks for.

The first process names a tensor, and those that hold parts of it send them. It is no gathering of a model: at any time there is one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nemotune.distributed.gradients import local
from nemotune.distributed.parallelize import layouts_of
from nemotune.distributed.world import World
from nemotune.models import CausalLM, build_model
from nemotune.weights import Layout


class Read(Protocol):
    """Gives a tensor by name, or its entry `index` along dim 0."""

    def __call__(self, name: str, index: int | None = None) -> Tensor: ...


def empty_whole(model: CausalLM) -> CausalLM:
    """The model as one process would hold it before any adapter: names, shapes and where it came from, no values."""
    whole = build_model(model.config)
    whole.source, whole.directory, whole.compute_dtype = model.source, model.directory, model.compute_dtype
    return whole


@contextmanager
def whole_tensors(model: CausalLM, world: World) -> Iterator[Read | None]:
    """For the first process a function that gives any tensor of the model, on the CPU; for the others None, after that one's block has ended."""
    tensors = {name: local(tensor).detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    layouts = {name: layout for name, layout in layouts_of(model).items() if name in tensors}
    held = world.gather({name: (layout, tensors[name].dtype) for name, layout in layouts.items()})
    collected = _Whole(tensors, held, world)
    if not world.is_first:
        while (asked := world.agree(None)) is not None:
            collected.send(*asked)
        yield None
        return
    try:
        yield collected.read
    finally:
        world.agree(None)


class _Whole:
    """`tensors` are this process's parts, `held` says for every rank which parts it has."""

    def __init__(self, tensors: Mapping[str, Tensor], held: list[dict[str, tuple[Layout, torch.dtype]]], world: World):
        self.tensors, self.held, self.world = tensors, held, world

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Tensor `name`, or its entry `index` along dim 0, from all."""
        self.world.agree((name, index))
        layout, dtype = next(of_rank[name] for of_rank in self.held if name in of_rank)
        whole = torch.empty(layout.shape if index is None else layout.shape[1:], dtype=dtype)
        for rank, part in self._senders(name, index):
            if rank == self.world.rank:
                values = self._own(name, index)
            else:
                values = torch.empty(part.local_shape, dtype=dtype, device=self.world.device)
                dist.recv(values, src=rank)
            part.put(values, whole)
        return whole

    def send(self, name: str, index: int | None = None) -> None:
        """This process's part of it to the first, where it is asked for."""
        if any(rank == self.world.rank for rank, _ in self._senders(name, index)):
            dist.send(self._own(name, index).to(self.world.device).contiguous(), dst=0)

    def _senders(self, name: str, index: int | None) -> list[tuple[int, Layout]]:
        """Ranks whose parts make up the tensor, and which they have: of several that have the same, the first."""
        found: dict[Layout, int] = {}
        for rank, of_rank in enumerate(self.held):
            if name in of_rank and (part := _entry(of_rank[name][0], index)) is not None and part.numel:
                found.setdefault(part, rank)
        return sorted(((rank, part) for part, rank in found.items()), key=lambda sender: sender[0])

    def _own(self, name: str, index: int | None) -> Tensor:
        tensor = self.tensors[name]
        return tensor if index is None else tensor[self.held[self.world.rank][name][0].place_of(index)]


def _entry(layout: Layout, index: int | None) -> Layout | None:
    """The layout of entry `index` along dim 0, None where none of it is held."""
    if index is None:
        return layout
    return layout.of_row() if layout.place_of(index) is not None else None
