"""Frozen experts in host memory, lent to the device block by block: for a base whose experts do not fit beside what trains.

Their tensors, wide or NF4, stay in pinned memory. The device has two buffers, each as large as one block's experts: that of the block in use
and that of the next one, which is copied on a stream of its own meanwhile, forwards and backwards. A product asks for its weights again in
the backward (`frozen_grouped_linear`), so no graph holds a copy. Adapters of experts are no part of this: they stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from nemotune.errors import RecipeError
from nemotune.models.base import CausalLM
from nemotune.models.layers import GroupedLinear

BUFFERS = 2


def offload_experts(model: CausalLM, device: torch.device | str) -> Lender:
    """Keep the experts of `model`, which lie on the host, there: `device` gets copies of them when they compute.

    Raises RecipeError for a model without experts.
    """
    lender = Lender(expert_blocks(model), torch.device(device))
    for block, modules in enumerate(expert_blocks(model)):
        start = 0
        for module in modules:
            stop = start + len(list(tensors(module)))
            module.lent = Lent(lender, block, slice(start, stop))
            start = stop
    return lender


def expert_blocks(model: CausalLM) -> list[list[GroupedLinear]]:
    """The projections of routed experts, block by block, as far as they are here. Raises RecipeError where the whole model has none."""
    if not model.config.expert_layers:
        raise RecipeError(f"model.offload: got 'experts', expected none: this {model.family} has no experts")
    found = [[module for module in block.modules() if isinstance(module, GroupedLinear)] for block in model.blocks]
    return [modules for modules in found if modules]


def expert_weights(model: CausalLM) -> set[str]:
    """The names of the wide weights of routed experts. Raises RecipeError where there are none."""
    experts = [module for modules in expert_blocks(model) for module in modules]
    return {f"{name}.weight" for name, module in model.named_modules() if any(module is expert for expert in experts)}


def tensors(module: GroupedLinear) -> Iterable[Tensor]:
    """The frozen weight, or the fields of its NF4."""
    return chain(module.parameters(recurse=False), module.buffers(recurse=False))


@dataclass(frozen=True)
class Lent:
    """One projection's share of a block's experts."""

    lender: Lender
    block: int
    part: slice

    @property
    def device(self) -> torch.device:
        return self.lender.device

    def __call__(self) -> list[Tensor]:
        """Its tensors on the device, which hold these values until another block asks for its own."""
        return self.lender.lend(self.block)[self.part]


class Lender:
    """The blocks' experts on the host, and the buffers. Blocks are used in their order, or in the reverse of it."""

    def __init__(self, blocks: list[list[GroupedLinear]], device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.host = [[tensor for module in modules for tensor in self._pinned(module)] for modules in blocks]
        self.buffers = [Buffer([torch.empty_like(t, device=device) for t in self.host[0]]) for _ in self.host[:BUFFERS]]
        self.in_use, self.direction = -1, 1

    def lend(self, block: int) -> list[Tensor]:
        """The experts of `block`; where it is another than last time, those of the block after it are fetched meanwhile."""
        buffer = self._bring(block)
        if block != self.in_use:
            self.direction = 1 if block > self.in_use else -1
            self.in_use = block
            following = block + self.direction
            if not 0 <= following < len(self.host):  # the pass turns round
                following = block - self.direction
            if 0 <= following < len(self.host):
                self._bring(following)
        if buffer.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(buffer.ready)
        return buffer.tensors

    def _bring(self, block: int) -> Buffer:
        """The buffer that has `block`, or the one that is not in use, to which its copy has begun."""
        for buffer in self.buffers:
            if buffer.block == block:
                return buffer
        buffer = next(buffer for buffer in self.buffers if buffer.block != self.in_use or len(self.buffers) == 1)
        buffer.block = block
        self._copy(block, buffer)
        return buffer

    def _copy(self, block: int, buffer: Buffer) -> None:
        if self.stream is None:
            for there, here in zip(self.host[block], buffer.tensors, strict=True):
                here.copy_(there)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # until what read the buffer has run
        with torch.cuda.stream(self.stream):
            for there, here in zip(self.host[block], buffer.tensors, strict=True):
                here.copy_(there, non_blocking=True)
            buffer.ready = self.stream.record_event()

    def _pinned(self, module: GroupedLinear) -> Iterable[Tensor]:
        """The tensors of `module`, which from now on lie where a GPU can read them by itself."""
        if self.device.type == "cuda":
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.detach().pin_memory(), requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.pin_memory())
        return [tensor.detach() for tensor in tensors(module)]


@dataclass
class Buffer:
    """Room for one block's experts on the device: whose they are, and since when."""

    tensors: list[Tensor]
    block: int | None = None
    ready: torch.cuda.Event | None = None
