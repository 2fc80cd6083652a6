"""Generation keeps sequences apart, stops where it should and gives the same tokens whatever the batch."""

from __future__ import annotations

import pytest
import torch
from toy_model import ToyModel, spell

from nemotune.errors import DataError
from nemotune.generate import generate, inference

PROMPTS = [[5, 3], [7], [1, 2, 3, 4, 5, 6, 7], [9, 9, 9], [11, 4, 8, 1], [5, 3]]


@pytest.fixture
def model():
    return ToyModel()


@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
def test_batched_equals_one_by_one_without_a_cache(model, batch_size):
    expected = [spell(model, prompt, max_new_tokens=12, stop_ids={2, 4}) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=12, stop_ids={2, 4}, batch_size=batch_size) == expected


def test_stop_token_is_included_and_last(model):
    free = spell(model, [7], max_new_tokens=12)
    stop = free[5]
    (tokens,) = generate(model, [[7]], max_new_tokens=12, stop_ids={stop})
    assert tokens == free[: free.index(stop) + 1]


def test_without_a_stop_token_it_ends_at_max_new_tokens(model):
    outputs = generate(model, PROMPTS, max_new_tokens=9, stop_ids=())
    assert [len(tokens) for tokens in outputs] == [9] * len(PROMPTS)


def test_ended_sequences_leave_the_batch(model):
    stops = {2, 4}
    lengths = sorted(len(spell(model, prompt, max_new_tokens=12, stop_ids=stops)) for prompt in PROMPTS)
    assert lengths[0] < lengths[-1], "the toy's answers should differ in length"
    model.calls.clear()
    generate(model, PROMPTS, max_new_tokens=12, stop_ids=stops)
    prefill, *steps = model.calls
    assert prefill == sum(map(len, PROMPTS))
    assert steps == [sum(length > step for length in lengths) for step in range(1, lengths[-1])]


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 2.0, "top_k": 3}])
def test_sampling_does_not_depend_on_the_batch(model, settings):
    alone = generate(model, PROMPTS, max_new_tokens=10, stop_ids={2}, batch_size=1, seed=3, **settings)
    assert generate(model, PROMPTS, max_new_tokens=10, stop_ids={2}, batch_size=4, seed=3, **settings) == alone
    assert generate(model, PROMPTS, max_new_tokens=10, stop_ids={2}, seed=4, **settings) != alone


def test_equal_prompts_are_sampled_apart(model):
    outputs = generate(model, [[5, 3]] * 8, max_new_tokens=10, stop_ids=(), temperature=1.5)
    assert len({tuple(tokens) for tokens in outputs}) > 4


def test_progress_counts_every_sequence_once(model):
    counts = []
    generate(model, PROMPTS, max_new_tokens=6, stop_ids={2, 4}, batch_size=4, progress=counts.append)
    assert sum(counts) == len(PROMPTS)


def test_empty_prompt_is_an_error_that_names_it(model):
    with pytest.raises(DataError, match=r"prompts\[1\]: got no tokens"):
        generate(model, [[1], []], max_new_tokens=2, stop_ids=())


def test_no_prompts_give_no_outputs(model):
    assert generate(model, [], max_new_tokens=2, stop_ids=()) == []


def test_inference_switches_dropout_and_gradients_off_and_mode_back(model):
    for mode in (True, False):
        model.train(mode)
        with inference(model):
            assert not model.training and not torch.is_grad_enabled()
        assert model.training is mode and torch.is_grad_enabled()
