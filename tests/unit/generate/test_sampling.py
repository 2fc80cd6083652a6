"""A sampled token comes from the tempered distribution, cut to its nucleus and to the top k."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemotune.generate import Sampling

LOGITS = torch.tensor([1.0, 3.0, 0.0, 2.0, -1.0])
DRAWS = 20_000


def frequencies(sampling: Sampling) -> np.ndarray:
    streams = sampling.streams(range(DRAWS))
    tokens = sampling.choose(LOGITS.expand(DRAWS, -1), streams)
    return np.bincount(tokens.numpy(), minlength=len(LOGITS)) / DRAWS


def test_greedy_takes_the_likeliest_and_draws_nothing():
    assert Sampling().choose(LOGITS[None], []).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_tempered_softmax(temperature):
    expected = (LOGITS / temperature).softmax(-1).numpy()
    # five standard errors of a binomial share
    assert np.all(np.abs(frequencies(Sampling(temperature=temperature)) - expected) < 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-9)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    # softmax: token 1 0.636, token 3 0.234, token 0 0.086: 0.8 is reached with the second
    got = frequencies(Sampling(temperature=1.0, top_p=0.8))
    assert got[[0, 2, 4]].sum() == 0
    assert got[1] == pytest.approx(0.7311, abs=0.016)


def test_top_k_keeps_so_many():
    got = frequencies(Sampling(temperature=1.0, top_k=1))
    assert got.tolist() == [0, 1, 0, 0, 0]


def test_tiny_top_p_is_greedy():
    assert frequencies(Sampling(temperature=5.0, top_p=1e-9)).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": 0}])
def test_impossible_settings_are_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
