"""Some optimiser steps on a random model in however many processes there are: losses, first gradients and final weights, whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from toy_split import ToySplit

from nemotune.data.loader import Loader
from nemotune.distributed import Gradients, World, arrange, connect, divide, layouts_of, replicas
from nemotune.distributed.gradients import local
from nemotune.distributed.world import BATCHES, TOKENS
from nemotune.lora import apply_lora, lora_modules
from nemotune.models import load_model
from nemotune.recipe import Lora, Train
from nemotune.recipe.degrees import Degrees
from nemotune.train.activation import set_activation_checkpointing
from nemotune.train.balance import Balance
from nemotune.train.optim import make_optimizer
from nemotune.train.step import accumulate, update, validation_loss

LENGTHS = (9, 14, 6, 21, 8, 11, 5, 17, 13)
PACKS = ((0, 3), (1, 2, 4), (5,), (7, 6), (8,))  # five rows: a step of four, and one of a single row
TARGETS = {
    "nemotron_h": ("attention", "mamba", "mlp", "shared_experts", "experts", "out_proj"),
    "llama": ("attention", "mlp"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, what of it is trained, and how."""

    directory: Path
    method: str = "lora"
    dropout: float = 0.0
    steps: int = 10
    optimizer: str = "sgd"
    learning_rate: float = 0.05
    global_batch_size: int = 4
    checkpointing: str = "none"
    dtype: str = "float32"
    quantization: str = "none"
    is_balanced: bool = False
    targets: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    lengths: tuple[int, ...] = LENGTHS
    packs: tuple[tuple[int, ...], ...] = PACKS


@dataclass(frozen=True)
class Trace:
    """What the steps gave; tensors are whole ones by their one-process names."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    held_out: float


def take_steps(case: Case, world: World | None = None) -> Trace:
    """Train as `case` says with this process's part of `world`."""
    world = world or World()
    model = load_model(
        case.directory,
        dtype=case.dtype,
        quantization=case.quantization,
        trainable=case.method != "lora",
        arrange=partial(arrange, world=world),
        ready=partial(divide, world=world, compute_dtype=getattr(torch, case.dtype)),
    )
    keys = None
    if case.method == "lora":
        lora = Lora(rank=4, alpha=8, dropout=case.dropout, targets=case.targets or TARGETS[model.family], **dict(case.options))
        keys = apply_lora(model, lora)
        _move_from_zero(model)
    connect(model, world, keys)
    set_activation_checkpointing(model, case.checkpointing)
    model.train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layouts = layouts_of(model)
    gradients = Gradients(parameters, layouts, replicas=replicas(model), world=world)
    if case.optimizer == "sgd":
        optimizer = torch.optim.SGD([{"params": list(parameters.values())}], lr=case.learning_rate, foreach=False)
    else:
        optimizer = make_optimizer(parameters, Train(learning_rate=case.learning_rate, weight_decay=0.1))
    split, hand = ToySplit(case.lengths, packs=case.packs), (world.index(*BATCHES), world.degree(*BATCHES))
    loader = Loader(split, global_batch_size=case.global_batch_size, micro_batch_size=1, seed=0, hand=hand)
    balance = None
    if case.is_balanced:
        total = lambda summed: world.sum(summed, "pipeline", *TOKENS)  # noqa: E731
        balance = Balance(model, rate=0.01, coef=0.1, total=total)
    losses, norms, first = [], [], {}
    for step in range(case.steps):
        result = accumulate(model, loader.step(step), keys=keys, seed=3, step=step, balance=balance, world=world)
        gradients.reduce()
        if step == 0:
            first = whole({name: local(p.grad) for name, p in parameters.items() if p.grad is not None}, layouts, world)
        losses.append(result.loss)
        norms.append(gradients.norm())
        update(parameters.values(), optimizer, learning_rate=case.learning_rate, grad_norm=norms[-1], max_grad_norm=1.0)
        if balance is not None:
            balance.step()
    held_out = validation_loss(model, loader.step(0), world=world)
    assert all(p is parameters[name] for name, p in model.named_parameters() if p.requires_grad), "as they were held before"
    return Trace(losses, norms, first, whole({name: local(p) for name, p in parameters.items()}, layouts, world), held_out)


def traces(cases: dict[str, Case], degrees: list[Degrees]) -> dict[tuple[str, Degrees], Trace]:
    """Every case under all of `degrees`, in the processes of the group that there is."""
    return {(name, each): take_steps(case, World(each, rank=dist.get_rank())) for each in degrees for name, case in cases.items()}


def whole(parts, layouts, world: World) -> dict[str, torch.Tensor]:
    """The tensors of which every process has a part; where several have the same, they must agree to rounding."""
    found: dict[str, torch.Tensor] = {}
    for of_rank in world.gather({name: (layouts[name], part.detach().clone()) for name, part in parts.items()}):
        for name, (layout, part) in of_rank.items():
            known = found.setdefault(name, torch.full(layout.shape, torch.nan))
            before = layout.take(known).clone()
            assert before.isnan().all() or (before - part).abs().max() <= 1e-5 * part.abs().max(), name
            layout.put(part, known)
    return found


def _move_from_zero(model) -> None:
    """B begins at zero, and so does the gradient of A: give B values, the same for every layout."""
    with torch.no_grad():
        for name, layer in lora_modules(model):
            layout = layer.layouts()["lora_B"]
            values = torch.randn(layout.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1
            layer.lora_B.copy_(layout.take(values))


def assert_same(one: Trace, other: Trace, tolerance: float = 1e-5, *, weights: bool = True) -> None:
    """Losses, gradients of the first step and final weights within `tolerance` of each tensor's largest value."""
    for mine, theirs in zip(one.losses, other.losses, strict=True):
        assert abs(mine - theirs) <= tolerance * abs(theirs), (one.losses, other.losses)
    assert abs(one.norms[0] - other.norms[0]) <= tolerance * other.norms[0]
    assert abs(one.held_out - other.held_out) <= tolerance * other.held_out
    for mine, theirs in [(one.gradients, other.gradients)] + [(one.weights, other.weights)] * weights:
        assert mine.keys() == theirs.keys() and theirs
        for name in theirs:
            assert (mine[name] - theirs[name]).abs().max() <= tolerance * theirs[name].abs().max(), name
