"""What a recipe may say where `data.format` is megatron: files of tokens, which have no rows to count, reject or render."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemotune.recipe.schema import Data, Train

__all__ = ["MOCK", "of_a_blend"]

MOCK = "mock"  # as data.train: random documents, no files


def of_a_blend(data: Data, train: Train) -> list[str]:
    """What a recipe says that files of tokens cannot follow."""
    problems = []
    if not data.packing:
        problems.append("data.packing: got false, expected true (documents apart) or concatenated for data.format: megatron")
    if data.max_samples is not None:
        problems.append("data.max_samples: expected null for data.format: megatron (train.max_steps bounds what is read of a blend)")
    if data.train.path == MOCK and train.max_steps is None:
        problems.append(f"train.max_steps: expected a number of steps for data.train: {MOCK}, which does not end")
    return problems
