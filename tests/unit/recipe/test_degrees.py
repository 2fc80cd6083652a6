"""Degrees of parallelism: `auto` is what is left, and what does not fit is told with what does."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nemotune.errors import RecipeError
from nemotune.recipe import builtin_names, load
from nemotune.recipe.degrees import Degrees
from nemotune.recipe.schema import Parallel


@pytest.mark.parametrize(
    ("asked", "world_size", "expected"),
    [
        ({}, 1, Degrees()),
        ({"nproc": 8}, None, Degrees(data=8)),
        ({"shard": 2}, 8, Degrees(data=4, shard=2)),
        ({"shard": 8, "expert": 8}, 8, Degrees(shard=8, expert=8)),
        ({"tensor": 2, "context": 2, "pipeline": 2, "expert": 4}, 16, Degrees(2, 2, 1, 2, 2, 4)),
        ({"data": 3, "tensor": 2}, 6, Degrees(data=3, tensor=2)),
    ],
)
def test_auto_is_what_the_others_leave(asked: dict[str, Any], world_size: int | None, expected: Degrees) -> None:
    found = Degrees.of(Parallel(**asked), world_size)
    assert found == expected
    assert found.world_size == (world_size or asked["nproc"])


@pytest.mark.parametrize("name", builtin_names())
def test_degrees_of_built_in_recipes_fit(name: str) -> None:
    parallel = load(name).parallel
    assert Degrees.of(parallel).world_size == parallel.nproc


@pytest.mark.parametrize(
    ("asked", "world_size", "told"),
    [
        ({"tensor": 3}, 8, ["pipeline=1 x data=auto x shard=1 x context=1 x tensor=3 for 8 processes", "fit: parallel.tensor=4; parallel.tensor=2;", "parallel.nproc=9"]),
        ({"data": 1}, 2, ["fit: parallel.data=2; parallel.shard=2; parallel.tensor=2; parallel.nproc=1"]),
        ({"data": 4, "shard": 4}, 8, ["expected a product of 8", "fit: parallel.data=2; parallel.shard=2; ", "parallel.nproc=16"]),
        ({"expert": 3}, 4, ["parallel.expert: got 3, expected a divisor of data x shard x context, 4 x 1 x 1 = 4", "fit: parallel.expert=4; parallel.expert=2;", "parallel.nproc=3"]),
        ({"data": 2, "tensor": 2, "expert": 4}, 4, ["parallel.expert: got 4", "2 x 1 x 1 = 2", "fit: parallel.expert=2"]),
        ({"tensor": 16}, 8, ["fit: parallel.tensor=8", "parallel.nproc=16"]),
        ({"nproc": 2, "shard": 3, "tensor": 5}, None, ["for 2 processes", "parallel.nproc=15"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_the_nearest_that_does(asked: dict[str, Any], world_size: int | None, told: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        Degrees.of(Parallel(**asked), world_size)
    assert [text for text in told if text not in str(error.value)] == [], error.value


@pytest.mark.parametrize("world_size", [1, 2, 6, 8])
@pytest.mark.parametrize(
    "asked", [{"tensor": 5}, {"expert": 5}, {"data": 7, "expert": 3}, {"pipeline": 9, "context": 4, "tensor": 3, "expert": 16}]
)
def test_every_suggestion_fits(asked: dict[str, Any], world_size: int) -> None:
    with pytest.raises(RecipeError) as error:
        Degrees.of(Parallel(**asked), world_size)
    suggestions = str(error.value).partition("Nearest that fit: ")[2].split("; ")
    assert suggestions
    for suggestion in suggestions:
        changed = {key: int(value) for key, value in re.findall(r"parallel\.(\w+)=(\d+)", suggestion)}
        assert Degrees.of(Parallel(**{**asked, **changed}), changed.get("nproc", world_size))
