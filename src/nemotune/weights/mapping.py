"""How a module's parameter lies on disk: as one tensor of the same name, or stacked from one tensor per expert.

Names of modules equal the checkpoint's, so a `Stack` is all that the families need; both directions follow from its pieces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """One tensor on disk: the whole of a parameter, or its entry `index` along dim 0."""

    name: str
    index: int | None = None


@dataclass(frozen=True)
class Stack:
    """Parameters matching `pattern` [E, ...] lie on disk as E tensors, named by `pattern`'s two groups: `{1}.{expert}.{2}`."""

    pattern: str

    def pieces(self, name: str, num_pieces: int) -> list[Piece] | None:
        """The disk tensors of parameter `name`, or None where the pattern does not match."""
        match = re.fullmatch(self.pattern, name)
        return match and [Piece(f"{match[1]}.{i}.{match[2]}", i) for i in range(num_pieces)]


def pieces_of(name: str, shape: Sequence[int], stacks: Sequence[Stack]) -> list[Piece]:
    """The disk tensors that make up parameter `name` of `shape`."""
    for stack in stacks:
        if pieces := stack.pieces(name, shape[0]):
            return pieces
    return [Piece(name)]
