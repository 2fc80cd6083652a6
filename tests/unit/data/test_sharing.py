"""Shares are exact, seeded, blind to order, and never part identical rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotune.data.sharing import TEST, TRAIN, VALIDATION, content_key, share_out
from nemotune.errors import DataError

CONTENTS = st.lists(st.text(max_size=5), min_size=4, max_size=60)


def keys_of(contents, seed=0):
    return np.array([content_key(content, seed) for content in contents], dtype=np.uint64)


def counts(shares):
    return [int((shares == share).sum()) for share in (TRAIN, VALIDATION, TEST)]


@given(st.integers(10, 500), st.sampled_from([0.0, 0.02, 0.1]), st.sampled_from([0.0, 0.05, 0.25]))
def test_shares_of_distinct_rows_are_exact(rows, validation, test):
    shares = share_out(keys_of(map(str, range(rows))), validation=validation, test=test)
    held = [max(1, round(share * rows)) if share else 0 for share in (validation, test)]
    assert counts(shares) == [rows - sum(held), *held]


@given(CONTENTS, st.randoms())
def test_order_of_the_rows_does_not_matter(contents, random):
    shuffled = contents[:]
    random.shuffle(shuffled)
    try:
        shares, again = (share_out(keys_of(order), validation=0.1, test=0.2) for order in (contents, shuffled))
    except DataError:
        return  # all the same row: nothing can be held out
    assert sorted(zip(contents, shares.tolist(), strict=True)) == sorted(zip(shuffled, again.tolist(), strict=True))


@given(st.lists(st.sampled_from("abcdefgh"), min_size=30, max_size=60))
def test_identical_rows_fall_on_one_side(contents):
    try:
        shares = share_out(keys_of(contents), validation=0.1, test=0.1)
    except DataError:
        return
    sides: dict[str, set[int]] = {}
    for content, share in zip(contents, shares.tolist(), strict=True):
        sides.setdefault(content, set()).add(share)
    assert all(len(each) == 1 for each in sides.values())


def test_seed_decides_who_is_held_out():
    contents = list(map(str, range(100)))
    held = [set(np.flatnonzero(share_out(keys_of(contents, seed), validation=0.1, test=0)).tolist()) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]


@pytest.mark.parametrize("validation", [0.02, 0.1, 0.4])
def test_test_rows_do_not_move_with_the_share_of_validation(validation):
    keys = keys_of(map(str, range(1000)))
    alone, beside = (share_out(keys, validation=share, test=0.1) for share in (0.0, validation))
    assert np.flatnonzero(beside == TEST).tolist() == np.flatnonzero(alone == TEST).tolist()
    assert int((alone == TEST).sum()) == 100


def test_shares_that_leave_nothing_to_train_on_are_an_error():
    with pytest.raises(DataError, match=r"data\.validation, data\.test: .* of 2 rows .* leave none to train on"):
        share_out(keys_of("ab"), validation=0.02, test=0.02)
