"""Datasets take turns by their weights, exactly; the rows of a run are a function of the step, whoever asks and in whatever order."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch
from toy_blend import make_dataset

from nemotune.data.loader import IGNORED, Loader
from nemotune.data.megatron.stream import PERIOD, Part, Settings, Stream, Turns
from nemotune.errors import DataError

WIDTH = 64


def stream(tmp_path, *, packed=True, seed=5, num_rows=48, weights=(0.7, 0.3), vocab_size=500):
    parts = []
    for name, weight, lengths in zip("ab", weights, ([30] * 40, [90, 5, 17] * 6), strict=True):
        prefix = tmp_path / name
        dataset = make_dataset(prefix, lengths) if not prefix.with_suffix(".idx").exists() else None
        parts.append(Part(str(prefix), 0, sum(lengths), weight))
        assert dataset is None or dataset.num_tokens == sum(lengths)
    return Stream(parts, Settings(num_rows, WIDTH, packed, seed, vocab_size, end=2))


def loader(split, **changed):
    return Loader(split, **{"global_batch_size": 8, "micro_batch_size": 2, "seed": 5, **changed})


def same(left, right):
    return all(torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(vars(x).values(), vars(y).values(), strict=True))


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (30, 70), (1, 1e-3, 5), [1 / n for n in range(1, 60)], (1e-5, 1)])
def test_datasets_have_their_share_of_the_rows(weights):
    """Within 1 % over 100,000 rows, or within a row where that is more: as a dataset of one row in 100,000 cannot have half a row."""
    turns, count = Turns(weights), 100_000
    places = np.array([turns[number][0] for number in range(count)])
    for at, weight in enumerate(weights):
        expected = count * weight / sum(weights)
        assert abs((places == at).sum() - expected) <= max(0.01 * expected, 1)
    assert np.allclose(turns.shares, np.array(weights) / sum(weights), atol=1 / PERIOD)


def test_a_dataset_gives_its_rows_one_after_another_over_periods():
    turns = Turns((5, 1, 2))
    following = [0, 0, 0]
    for number in range(3000):
        place, at = turns[number]
        assert at == following[place]
        following[place] += 1
    first = turns[PERIOD][1], turns[PERIOD + 1][1]
    counts = [round(PERIOD * share) for share in turns.shares]
    assert first == tuple(counts[turns[n][0]] + turns[n][1] for n in (0, 1))


def test_a_dataset_that_is_named_twice_gives_other_rows_each_time(tmp_path):
    one = stream(tmp_path).parts[0]
    twice = Stream([one, one], stream(tmp_path).settings)
    found = [twice.row(number) for number in range(10)]
    assert [place for place, _ in found] == [0, 1] * 5
    assert [row for place, row in found if place == 0] != [row for place, row in found if place == 1]


@pytest.mark.parametrize("packed", [True, False])
def test_a_step_is_the_same_whoever_takes_it(tmp_path, packed):
    whole = loader(stream(tmp_path, packed=packed))
    steps = [whole.step(index) for index in range(20)]  # over three of the loader's epochs, and several of the datasets'
    for index in (19, 7, 0):
        assert same(loader(stream(tmp_path, packed=packed)).step(index), steps[index])
        dealt = [loader(stream(tmp_path, packed=packed), hand=(hand, 2)).step(index) for hand in (0, 1)]
        assert same([batch for pair in zip(*dealt, strict=True) for batch in pair], steps[index])
    assert not same(loader(stream(tmp_path, packed=packed, seed=6)).step(0), steps[0])
    assert not same(steps[0], steps[6])


def test_the_length_of_a_run_does_not_change_its_steps(tmp_path):
    short, long = loader(stream(tmp_path, num_rows=16)), loader(stream(tmp_path, num_rows=800))
    assert (short.steps_per_epoch, long.steps_per_epoch) == (2, 100)
    assert all(same(short.step(index), long.step(index)) for index in range(7))


@pytest.mark.parametrize("packed", [True, False])
def test_every_token_but_a_documents_first_is_a_target(tmp_path, packed):
    for batch in loader(stream(tmp_path, packed=packed)).step(0):
        borders = batch.cu_seqlens.tolist()
        lasts = [end - 1 for end in borders[1:]]
        inside = [at for at in range(batch.num_tokens) if at not in lasts]
        assert (batch.targets_T[lasts] == IGNORED).all() and torch.equal(batch.targets_T[inside], batch.tokens_T[[at + 1 for at in inside]])
        assert batch.num_tokens <= 2 * WIDTH and (packed or len(borders) == 3)


def test_a_long_run_costs_neither_time_nor_memory(tmp_path):
    """40,000 steps of 3,072 rows of 8,192 tokens; one row of the last step is looked at. A list of its rows would be a gigabyte."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = Stream([Part("mock", 0, 1 << 26, 1.0)], Settings(40_000 * 3072, 8192, True, 1, 500, end=2))
    long = Loader(made, global_batch_size=3072, micro_batch_size=1, seed=1)
    assert long.steps_per_epoch == 40_000
    assert made[int(made.packs[40_000 * 3072 - 1][0])].row == 40_000 * 3072 - 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_a_token_that_the_tokenizer_lacks_is_refused_with_its_dataset(tmp_path):
    with pytest.raises(DataError, match=r"/[ab]: got the token ids \d+ to \d+, expected 0 to 19: .*another tokenizer"):
        loader(stream(tmp_path, vocab_size=20)).step(0)
