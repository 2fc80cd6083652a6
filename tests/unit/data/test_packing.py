"""Packed rows hold every document once and never overflow; the order is seeded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotune.data.packing import pack, pack_stream

LENGTHS = st.lists(st.integers(1, 64), max_size=200)


@given(LENGTHS)
def test_every_document_is_packed_once_within_the_capacity(lengths):
    groups = pack(lengths, capacity=64)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in group) <= 64 for group in groups)


@given(LENGTHS)
def test_at_most_one_row_is_left_half_empty(lengths):
    filled = sorted(sum(lengths[index] for index in group) for group in pack(lengths, capacity=64))
    assert all(fill * 2 > 64 for fill in filled[1:])


def test_each_document_goes_where_it_fits_best():
    assert pack([30, 34, 50, 14, 20], capacity=64) == [[2, 3], [1, 0], [4]]


def test_document_over_the_capacity_is_our_own_bug():
    with pytest.raises(ValueError, match="document 1 has 65 tokens"):
        pack([3, 65], capacity=64)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 3))
def test_stream_packs_in_windows_and_keeps_every_document(lengths, window, seed):
    rows = list(pack_stream(lengths, capacity=64, seed=seed, window=window))
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(max(row) // window == min(row) // window for row in rows)
    assert rows == list(pack_stream(iter(lengths), capacity=64, seed=seed, window=window))


def test_rows_are_shuffled_after_packing():
    lengths = list(range(1, 65)) * 4
    rows = list(pack_stream(lengths, capacity=64, seed=0))
    first_lengths = [lengths[row[0]] for row in rows]
    assert first_lengths != sorted(first_lengths, reverse=True)
    assert rows != list(pack_stream(lengths, capacity=64, seed=1))


def test_many_documents_fill_their_rows():
    lengths = [1 + (index * 2654435761) % 4096 for index in range(100_000)]
    groups = pack(lengths, capacity=4096)
    assert sum(lengths) / (len(groups) * 4096) > 0.99
