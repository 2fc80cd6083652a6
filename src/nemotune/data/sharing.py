"""Which rows go to training, validation and test: exact shares, seeded, by content.

Rows are ordered by a hash of (seed, content); the first are the test rows, those after them validation. So a share does not depend on
the order of the rows, the same seed and share hold out the same test rows whatever is validated on, and identical rows fall on one side.
"""

from __future__ import annotations

import hashlib

import numpy as np

from nemotune.errors import DataError

TRAIN, VALIDATION, TEST = 0, 1, 2


def content_key(content: str, seed: int) -> int:
    """The 64-bit place of a row in the seeded order."""
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8, key=str(seed).encode()).digest(), "big")


def share_out(keys: np.ndarray, *, validation: float, test: float) -> np.ndarray:
    """TRAIN, VALIDATION or TEST for each row; a share above 0 holds out at least one row, and identical rows may add a few.

    keys [rows] uint64 from `content_key`. Raises DataError when nothing would be left to train on.
    """
    order = np.argsort(keys, kind="stable")
    first = _extend(keys, order, _count(test, len(keys)))
    second = _extend(keys, order, first + _count(validation, len(keys)))
    if len(keys) and second >= len(keys):
        raise DataError(
            f"data.validation, data.test: shares {validation} and {test} of {len(keys)} rows (identical ones stay together) leave none "
            "to train on; lower them or give held-out rows of their own"
        )
    shares = np.full(len(keys), TRAIN, dtype=np.int8)
    shares[order[:first]] = TEST
    shares[order[first:second]] = VALIDATION
    return shares


def _count(share: float, rows: int) -> int:
    return max(1, round(share * rows)) if share and rows else 0


def _extend(keys: np.ndarray, order: np.ndarray, count: int) -> int:
    """`count` moved on until it parts no group of equal keys."""
    while 0 < count < len(order) and keys[order[count]] == keys[order[count - 1]]:
        count += 1
    return count
