"""An epoch reads every token once; documents stay whole where they are packed; the next epoch is another shuffle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_blend import make_dataset, spans

from nemotune.data.megatron.mock import PAGE, MockDataset
from nemotune.data.megatron.rows import BLOCK_ROWS, Rows, permuted


def rows_of(dataset, *, packed=True, width=32, begin=0, end=None, key=(7, 0)) -> Rows:
    return Rows(dataset, begin=begin, end=dataset.num_tokens if end is None else end, sequence_length=width, packed=packed, key=key)


def lengths(seed: int, count: int, longest: int) -> list[int]:
    return np.random.RandomState(seed).randint(0, longest, count).tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=60), st.booleans(), st.integers(2, 40), st.integers(0, 3))
def test_every_token_is_in_one_row_of_an_epoch(tmp_path_factory, lengths, packed, width, epoch):
    dataset = make_dataset(tmp_path_factory.mktemp("d") / "a", lengths)
    rows = rows_of(dataset, packed=packed, width=width)
    seen = np.zeros(dataset.num_tokens, dtype=int)
    for number in range(epoch * rows.num_rows, (epoch + 1) * rows.num_rows):
        sizes = [end - start for start, end in spans(rows[number])]
        assert 0 < sum(sizes) <= width and min(sizes) > 0
        for start, end in spans(rows[number]):
            seen[start:end] += 1
    alone = dataset.num_tokens % width == 1  # a last token that would be a row by itself
    assert seen.max(initial=1) == 1 and seen.sum() == dataset.num_tokens - alone


def test_packed_rows_keep_documents_apart_and_whole(tmp_path):
    sizes = lengths(0, 400, 25)
    dataset = make_dataset(tmp_path / "a", [max(2, size) for size in sizes])
    starts = dataset.starts(0, dataset.num_tokens).tolist()
    whole = set(zip(starts, [*starts[1:], dataset.num_tokens], strict=True))
    rows = rows_of(dataset, width=100)
    found = [span for number in range(rows.num_rows) for span in spans(rows[number])]
    assert all(len(document) == 1 for number in range(rows.num_rows) for document in rows[number])
    assert all(any(start <= begin and end <= stop for start, stop in whole) for begin, end in found[:50])
    blocks = -(-rows.num_rows // BLOCK_ROWS)
    assert len(whole - set(found)) <= 3 * blocks  # one at each border of blocks, two that fill gaps: of 400, where cuts every 100 part 47


def test_a_document_longer_than_a_row_is_split_at_the_rows_width(tmp_path):
    dataset = make_dataset(tmp_path / "a", [250, 30])
    rows = rows_of(dataset, width=100)
    assert sorted(span for number in range(rows.num_rows) for span in spans(rows[number])) == [(0, 100), (100, 200), (200, 250), (250, 280)]


def test_concatenated_rows_are_one_stream_without_borders(tmp_path):
    dataset = make_dataset(tmp_path / "a", [9, 50, 14, 3, 24])
    rows = rows_of(dataset, packed=False, width=25)
    made = [rows[number] for number in range(rows.num_rows)]
    assert [len(row) for row in made] == [1, 1, 1, 1]  # each a single document
    order = np.concatenate([dataset.read(start, end) for row in rows._block(0, 0) for start, end in spans(row)]) - 3
    ends = {0: 9, 9: 59, 59: 73, 73: 76, 76: 100}
    at = 0
    while at < 100:  # whole documents end to end, in another order than the file's
        end = ends[order[at]]
        assert order[at : at + end - order[at]].tolist() == list(range(order[at], end))
        at += end - order[at]
    assert order[0] != 0


@pytest.mark.parametrize("packed", [True, False])
def test_an_order_is_that_of_seed_dataset_and_epoch(tmp_path, packed):
    dataset = make_dataset(tmp_path / "a", lengths(1, 300, 60))

    def epoch(number, **settings):
        rows = rows_of(dataset, packed=packed, **settings)
        return [rows[number * rows.num_rows + at] for at in range(rows.num_rows)]

    assert epoch(1) == epoch(1)
    epochs = [epoch(0), epoch(1), epoch(0, key=(8, 0)), epoch(0, key=(7, 1))]
    orders = [[spans(row)[0][0] // (BLOCK_ROWS * 32) for row in rows] for rows in epochs]  # of the blocks
    contents = [{frozenset(spans(row)) for row in rows} for rows in epochs]
    for found in (orders, contents):
        assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_only_the_range_that_was_given_is_read(tmp_path):
    dataset = make_dataset(tmp_path / "a", [40] * 50)
    rows = rows_of(dataset, begin=400, end=1200)
    found = [span for number in range(rows.num_rows) for span in spans(rows[number])]
    assert (min(found)[0], max(end for _, end in found), sum(end - start for start, end in found)) == (400, 1200, 800)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 9)))
def test_a_permutation_hits_everything_once(count, key):
    assert sorted(permuted(index, count, key=key) for index in range(count)) == list(range(count))


def test_a_permutation_is_a_shuffle():
    """Neighbours land as far apart as in numpy's: a third of the length on average, within four standard deviations."""
    count, far = 3000, []
    for seed in range(4):
        places = np.array([permuted(index, count, key=(seed, 0, 0)) for index in range(count)])
        far.append(np.abs(np.diff(places)).mean() / count)
        assert abs(np.corrcoef(np.arange(count), places)[0, 1]) < 4 / np.sqrt(count)
    assert abs(np.mean(far) - 1 / 3) < 4 * 0.2357 / np.sqrt(4 * count)


def test_the_mock_dataset_is_the_same_however_it_is_read():
    one, other = (MockDataset(seed=3, vocab_size=300, end=2) for _ in range(2))
    tokens = one.read(0, 3 * PAGE)
    assert (other.read(PAGE - 5, PAGE + 7) == tokens[PAGE - 5 : PAGE + 7]).all()
    assert tokens.min() >= 0 and tokens.max() < 300 and len(np.unique(tokens)) > 200
    starts = one.starts(0, 3 * PAGE)
    assert (tokens[starts[1:] - 1] == 2).all() and tokens[-1] == 2
    assert (one.starts(100, 5000) == starts[(starts >= 100) & (starts < 5000)]).all()
    assert (MockDataset(seed=4, vocab_size=300, end=2).read(0, PAGE) != tokens[:PAGE]).any()
