"""Which documents share a packed row: best-fit decreasing, in windows, shuffled after.

Works on lengths alone: documents of one row never see each other, since the model is given their borders. At most one row of a
window is left half empty, and the window bounds the memory of sets too long to sort whole.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

WINDOW = 1 << 16  # documents sorted at a time


def pack(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Groups of indices whose lengths sum to at most `capacity`, longest documents placed first, each in the fullest group that has room.

    O(n log n) for sorting and searching; the open groups are kept by the room they have left, of which there are at most
    `capacity` values. Raises ValueError for a length over `capacity`.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    groups: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)  # room left -> numbers of the groups that have it
    rooms: list[int] = []  # keys of by_room, sorted
    for index in order.tolist():
        length = int(lengths[index])
        at = bisect_left(rooms, length)
        if length > capacity:
            raise ValueError(f"document {index} has {length} tokens, more than the {capacity} of a packed row")
        if at == len(rooms):
            number, room = len(groups), capacity
            groups.append([])
        else:
            room = rooms[at]
            number = by_room[room].pop()
            if not by_room[room]:
                del rooms[at]
        groups[number].append(index)
        left = room - length
        if not by_room[left]:
            insort(rooms, left)
        by_room[left].append(number)
    return groups


def pack_stream(lengths: Iterable[int], *, capacity: int, seed: int, window: int = WINDOW) -> Iterator[list[int]]:
    """Packed rows of a stream of lengths, window after window; the rows of a window come shuffled, since best-fit sorts by length."""
    lengths = iter(lengths)
    first, number = 0, 0
    while chunk := list(islice(lengths, window)):
        groups = pack(chunk, capacity=capacity)
        for position in np.random.RandomState([seed, number]).permutation(len(groups)).tolist():
            yield [first + index for index in groups[position]]
        first, number = first + len(chunk), number + 1
