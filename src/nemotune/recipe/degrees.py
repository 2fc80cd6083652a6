"""The degrees of parallelism of a run: `recipe.parallel` with `auto` filled in, for a number of processes.

Arithmetic alone: whether the degrees fit a model is in `plan/parallel.py`, which process does what in `distributed/`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nemotune.errors import RecipeError
from nemotune.recipe.schema import Parallel

__all__ = ["AXES", "Degrees"]

AXES = ("pipeline", "data", "shard", "context", "tensor")  # outermost first: ranks that follow one another are of one tensor group
PLAINEST = ("data", "shard", "tensor", "expert", "context", "pipeline")  # of two that are as near, the first is suggested first
SUGGESTIONS = 3


@dataclass(frozen=True)
class Degrees:
    """Processes along each axis; `expert` is no axis of its own: its groups are consecutive ranks of data x shard x context."""

    pipeline: int = 1
    data: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @classmethod
    def of(cls, parallel: Parallel, world_size: int | None = None) -> Degrees:
        """Those of `parallel` for so many processes (None: `parallel.nproc`), `data: auto` being what the others leave.

        Raises RecipeError where they do not fit, naming the nearest that do.
        """
        world_size = world_size or parallel.nproc
        found = _resolved(parallel, world_size)
        if found.world_size != world_size:
            got = " x ".join(f"{axis}={getattr(parallel, axis)}" for axis in AXES)
            raise RecipeError(
                f"parallel: got {got} for {_processes(world_size)}, expected a product of {world_size}. {_nearest(parallel, world_size)}"
            )
        if found.expert_ranks % found.expert:
            raise RecipeError(
                f"parallel.expert: got {found.expert}, expected a divisor of data x shard x context, "
                f"{found.data} x {found.shard} x {found.context} = {found.expert_ranks}. {_nearest(parallel, world_size)}"
            )
        return found

    @property
    def world_size(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def expert_ranks(self) -> int:
        """Ranks of one pipeline stage that see different tokens, over which experts may be divided."""
        return self.data * self.shard * self.context


def _resolved(parallel: Parallel, world_size: int) -> Degrees:
    """As asked, whether or not it fits."""
    p = parallel
    data = max(1, world_size // (p.pipeline * p.shard * p.context * p.tensor)) if p.data == "auto" else p.data
    return Degrees(pipeline=p.pipeline, data=data, shard=p.shard, context=p.context, tensor=p.tensor, expert=p.expert)


def _nearest(parallel: Parallel, world_size: int) -> str:
    """The settings nearest to what was asked that fit: fewest keys changed, then by the least factors, then the plainest axis."""
    asked = _resolved(parallel, world_size)

    def changes(found: Degrees) -> dict[str, int]:
        return {
            key: getattr(found, key) for key in PLAINEST if getattr(found, key) != getattr(asked, key) and getattr(parallel, key) != "auto"
        }

    def distance(found: Degrees) -> tuple[int, float, list[int]]:
        changed = changes(found)
        factors = sum(abs(math.log(value / getattr(asked, key))) for key, value in changed.items())
        return len(changed), round(factors, 6), [PLAINEST.index(key) for key in changed]

    nearest = sorted(_fitting(world_size), key=distance)
    told = [" ".join(f"parallel.{key}={value}" for key, value in changes(found).items()) for found in nearest]
    nproc = _nearest_nproc(parallel, world_size)
    return f"Nearest that fit: {'; '.join([*dict.fromkeys(told)][:SUGGESTIONS] + ([f'parallel.nproc={nproc}'] if nproc else []))}"


def _fitting(world_size: int) -> Iterator[Degrees]:
    """All degrees that fit so many processes."""
    for pipeline, data, shard, context, tensor in _factors(world_size, len(AXES)):
        for expert in _divisors(data * shard * context):
            yield Degrees(pipeline, data, shard, context, tensor, expert)


def _nearest_nproc(parallel: Parallel, world_size: int) -> int | None:
    """The number of processes nearest to `world_size` that fits the degrees as they are asked, if there is one."""
    least = _resolved(parallel, 1)  # `auto` is 1
    lacking = least.expert // math.gcd(least.expert, least.expert_ranks)
    if parallel.data != "auto":
        return least.world_size if lacking == 1 else None
    unit = least.world_size * lacking
    return unit * max(1, round(world_size / unit))


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `number` as a product of `count` factors, in order."""
    if count == 1:
        yield (number,)
        return
    for first in _divisors(number):
        for others in _factors(number // first, count - 1):
            yield (first, *others)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"
