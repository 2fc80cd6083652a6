"""What a checkpoint holds of a run, and which process writes which part of it: trained parameters, correction biases, the optimiser's state.

Everything goes by the names and places that it has in one process, so it is read under any layout. Moments lie as their parameter does.
What groups of the optimiser say (rate, decay) is not kept: it follows from the recipe and the number of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nemotune.distributed.gradients import local
from nemotune.errors import CheckpointError
from nemotune.models import CausalLM
from nemotune.models.nemotron_h import Router
from nemotune.train.storage import Block, read_blocks
from nemotune.weights import Layout

Place = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A tensor of the state as this process holds it, and how it holds the parameter that it belongs to. `put` takes back a copy."""

    name: str
    values: Tensor
    layout: Layout
    parameter: str
    of_parameter: Layout
    put: Callable[[Tensor], None] | None = None

    def blocks(self) -> Iterator[tuple[Place, Block]]:
        """Views of what is held, each with the block of the parameter that it goes with: the first, where it lies otherwise."""
        if self.layout.is_whole:
            yield (0,) * len(self.of_parameter.shape), Block(self.name, self.layout.shape, (0,) * len(self.layout.shape), self.values)
            return
        for box in self.layout.boxes():
            if math.prod(box.size):
                yield box.whole, Block(self.name, self.layout.shape, box.whole, box.of_part(self.values))


def blocks_to_write(model: CausalLM, optimizer: Optimizer, layouts: Mapping[str, Layout], share: Mapping[str, set[Place]]) -> list[Block]:
    """Of what this process holds the blocks that are its `share`, as views."""
    entries = _entries(model, optimizer, layouts)
    return [block for entry in entries for place, block in entry.blocks() if place in share.get(entry.parameter, ())]


def shares(held: Sequence[Mapping[str, Layout]]) -> list[dict[str, set[Place]]]:
    """Of what each rank holds the blocks that it is to write, by where they begin: each block once, as evenly as they allow."""
    holders: dict[tuple[str, Place, Place], list[int]] = {}
    for rank, layouts in enumerate(held):
        for name, layout in layouts.items():
            for box in layout.boxes():
                if math.prod(box.size):
                    holders.setdefault((name, box.whole, box.size), []).append(rank)
    load, found = [0] * len(held), [dict[str, set[Place]]() for _ in held]
    for (name, place, size), ranks in holders.items():
        writer = min(ranks, key=lambda rank: load[rank])
        load[writer] += math.prod(size)
        found[writer].setdefault(name, set()).add(place)
    return found


def kept_layouts(model: CausalLM, layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """Of what this process has of the tensors that a checkpoint holds beside the optimiser's; those without a layout are whole."""
    return {name: layouts.get(name) or Layout.whole(tensor.shape) for name, tensor in _kept(model).items()}


def load_state(model: CausalLM, optimizer: Optimizer, layouts: Mapping[str, Layout], directory: Path) -> None:
    """Give model and optimiser what `directory` holds. Raises CheckpointError where it is damaged, of another run or no mere data."""
    _make_state(optimizer)
    entries = list(_entries(model, optimizer, layouts))
    try:
        read_blocks([block for entry in entries for _, block in entry.blocks()], directory)
    except torch.OutOfMemoryError:
        raise  # which no other checkpoint mends
    except (RuntimeError, ValueError, OSError, KeyError, EOFError) as error:
        raise CheckpointError(str(error).strip().splitlines()[-1]) from error
    for entry in entries:
        if entry.put is not None:
            entry.put(entry.values)


def _kept(model: CausalLM) -> dict[str, Tensor]:
    """Trained parameters, and what no optimiser moves but `balance.py` may."""
    trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router) and module.weight.requires_grad}
    return trained | {f"{name}.e_score_correction_bias": router.e_score_correction_bias for name, router in routers.items()}


def _entries(model: CausalLM, optimizer: Optimizer, layouts: Mapping[str, Layout]) -> Iterator[Entry]:
    layouts = kept_layouts(model, layouts)
    for name, tensor in _kept(model).items():
        yield Entry(f"model.{name}", local(tensor).detach(), layouts[name], name, layouts[name])
        state = optimizer.state.get(tensor, {}) if isinstance(tensor, nn.Parameter) else {}
        for key, value in state.items():
            if value is not None:
                yield _of_optimizer(f"optimizer.state.{name}.{key}", state, key, name, layouts[name])


def _of_optimizer(name: str, state: dict[str, Any], key: str, parameter: str, layout: Layout) -> Entry:
    """A moment lies as its parameter; a number, and what is not one value for each of the parameter's, is kept whole."""
    value = state[key]
    if not isinstance(value, Tensor):
        put = lambda read: state.update({key: type(value)(read.item())})  # noqa: E731
        return Entry(name, torch.tensor(value), Layout.whole(()), parameter, layout, put)
    values = local(value).detach()
    if tuple(values.shape) == layout.local_shape and (layout.is_whole or values.is_floating_point()):
        return Entry(name, values, layout, parameter, layout)
    assert layout.is_whole or values.ndim == 0, f"{name}: {tuple(values.shape)} of a parameter that is held in part"
    return Entry(name, values, Layout.whole(values.shape), parameter, layout)


def _make_state(optimizer: Optimizer) -> None:
    """An optimiser makes its state in its first step: one without gradients and rates, which moves nothing."""
    if optimizer.state:
        return
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        _set_rate(group, 0.0)
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        _set_rate(group, rate)


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
