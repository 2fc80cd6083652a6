"""The processes of a run: who this one is, the axes along which they share the work, and sums over them.

A run in one process has a World of one, in which every sum is its own argument; nothing else asks how many there are.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from itertools import product
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from nemotune.recipe.degrees import AXES, Degrees

TOKENS = ("data", "shard", "context")  # axes whose ranks see different tokens
BATCHES = ("data", "shard")  # axes whose ranks see different rows
PATIENCE = timedelta(minutes=30)  # the longest that one process waits for another: rank 0 may write a large checkpoint


class World:
    """The processes, `degrees` along each axis; `rank` is this one's number. Made by `start`, or `World()` for one process."""

    def __init__(self, degrees: Degrees | None = None, *, rank: int = 0, device: torch.device | str = "cpu"):
        self.degrees, self.rank, self.device = degrees or Degrees(), rank, torch.device(device)
        self.sizes = tuple(getattr(self.degrees, axis) for axis in AXES)
        self._groups: dict[tuple[int, ...], Any] = {}  # all that there are, this process in them or not
        self._asked: set[tuple[str, ...]] = set()

    @property
    def size(self) -> int:
        return math.prod(self.sizes)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def degree(self, *axes: str) -> int:
        """Ranks along these axes together."""
        return math.prod(size for axis, size in zip(AXES, self.sizes, strict=True) if axis in axes)

    def index(self, *axes: str) -> int:
        """This rank's place along these axes, the last of them running fastest."""
        place = 0
        for axis, size, at in zip(AXES, self.sizes, self.coordinates(self.rank), strict=True):
            if axis in axes:
                place = place * size + at
        return place

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """The place of `rank` along each axis."""
        places = []
        for size in reversed(self.sizes):
            rank, at = divmod(rank, size)
            places.append(at)
        return tuple(reversed(places))

    def ranks(self, *axes: str) -> tuple[int, ...]:
        """The ranks that differ from this one along these axes alone, in order."""
        mine = self.coordinates(self.rank)
        choices = [range(size) if axis in axes else (at,) for axis, size, at in zip(AXES, self.sizes, mine, strict=True)]
        return tuple(self._rank_of(places) for places in product(*choices))

    def group(self, *axes: str) -> Any:
        """The process group along these axes. Its first use makes it, which every process does at the same time."""
        ranks = self.ranks(*axes)
        if axes not in self._asked:  # not: whether the ranks have a group, which may be so in some processes alone
            self._asked.add(axes)
            self.make_groups([ranks])
        return self._groups[ranks]

    def make_groups(self, wanted: Iterable[tuple[int, ...]]) -> None:
        """Make the process groups of these sets of ranks, this one in each, but for those that there are. Every process calls it with its own,
        at the same time."""
        everyone = self.gather(sorted(set(wanted)))
        for ranks in sorted({ranks for of_rank in everyone for ranks in of_rank} - self._groups.keys()):
            self._groups[ranks] = dist.new_group(list(ranks), timeout=PATIENCE)  # which all processes call, members or not

    def group_of(self, ranks: tuple[int, ...]) -> Any:
        """One that `make_groups` has made."""
        return self._groups[ranks]

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The axes as PyTorch wants them, for what is built on a DeviceMesh."""
        return dist.init_device_mesh(self.device.type, self.sizes, mesh_dim_names=AXES)

    @cached_property
    def expert_ranks(self) -> tuple[int, ...]:
        """The ranks among which the experts of each layer are divided, this one included."""
        together, expert = self.ranks(*TOKENS), self.degrees.expert
        first = together.index(self.rank) // expert * expert
        return together[first : first + expert]

    def sum(self, values: Tensor, *axes: str) -> Tensor:
        """The sum over these axes, in place."""
        if self.degree(*axes) > 1:
            dist.all_reduce(values, group=self.group(*axes))
        return values

    def any(self, said: bool) -> bool:
        """Whether any process says so."""
        if self.size == 1:
            return said
        flag = torch.tensor(int(said), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def agree(self, value: Any) -> Any:
        """What rank 0 has, for everyone."""
        if self.size == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def gather(self, value: Any) -> list[Any]:
        """What every process has, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier()

    def _rank_of(self, places: tuple[int, ...]) -> int:
        rank = 0
        for size, at in zip(self.sizes, places, strict=True):
            rank = rank * size + at
        return rank


ALONE = World()


@contextmanager
def start(degrees: Degrees) -> Iterator[World]:
    """The world of this process until the end of the block, as torchrun tells it; that of one process outside of torchrun.

    On a GPU each process takes the one of its local rank and sums by NCCL, objects and checkpoints by gloo; on the CPU all is gloo.
    """
    if degrees.world_size == 1:
        yield World(device="cuda" if torch.cuda.is_available() else "cpu")
        return
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    found, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(backend, store=_fresh(found, rank, size), rank=rank, world_size=size, timeout=PATIENCE)
    yield World(degrees, rank=dist.get_rank(), device=device)
    dist.destroy_process_group()  # not after an error: NCCL would wait for what the others no longer take part in


def _fresh(store: dist.Store, rank: int, size: int) -> dist.Store:
    """The part of torchrun's `store` that this attempt alone has: it is one store over all restarts, addresses of processes that are gone in it.

    Rank 0 names the part. It cannot tell who of those that asked is gone, so it answers all; each answer is read by who asked alone. torchrun's
    own count of restarts would not do: each machine has its own.
    """
    own = uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", own)
        name = store.get(f"answers/{own}").decode()
        store.set(f"{name}/{rank}", "here")
        return dist.PrefixStore(name, store)
    end = time.monotonic() + PATIENCE.total_seconds()
    while missing := [other for other in range(1, size) if not store.check([f"{own}/{other}"])]:
        if time.monotonic() > end:
            raise TimeoutError(f"processes {missing} did not start within {PATIENCE}")
        for other in missing:
            if store.check([f"asks/{other}"]):
                store.set(f"answers/{store.get(f'asks/{other}').decode()}", own)
        time.sleep(0.02)
    return dist.PrefixStore(own, store)
