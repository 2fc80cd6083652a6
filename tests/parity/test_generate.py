"""Greedy native generation gives the tokens of transformers' `generate`, one prompt at a time or many in a batch."""

from __future__ import annotations

import pytest
import torch
from random_models import VARIANTS, make, with_our_dt_limits

from nemotune.generate import generate
from nemotune.models import load_model

PROMPT_LENGTHS = [1, 2, 3, 5, 8, 9, 17, 30]  # shorter and longer than the convolution (4) and the chunk (8)
NEW_TOKENS = 20


def prompts():
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 96, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@pytest.fixture
def pair(request, tmp_path):
    theirs = make(request.param)
    theirs.save_pretrained(tmp_path / "hf")
    return with_our_dt_limits(theirs), load_model(tmp_path / "hf", dtype="float32")


def their_tokens(model, prompt, *, stop_ids=None):
    # transformers 5.23 cannot cache a model without attention: its cache asks an attention layer for the length
    has_attention = "attention" in getattr(model.config, "layers_block_type", ["attention"])
    tokens = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=NEW_TOKENS,
        eos_token_id=stop_ids or [], pad_token_id=0, use_cache=has_attention,
    )  # fmt: skip
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("pair", VARIANTS, indirect=True)
def test_greedy_tokens_equal_transformers(pair):
    theirs, ours = pair
    expected = [their_tokens(theirs, prompt) for prompt in prompts()]
    assert generate(ours, prompts(), max_new_tokens=NEW_TOKENS, stop_ids=(), batch_size=1) == expected
    assert generate(ours, prompts(), max_new_tokens=NEW_TOKENS, stop_ids=(), batch_size=3) == expected
    assert generate(ours, prompts(), max_new_tokens=NEW_TOKENS, stop_ids=(), batch_size=16) == expected


@pytest.mark.parametrize("pair", ["hybrid", "llama"], indirect=True)
def test_stop_tokens_end_answers_as_in_transformers(pair):
    theirs, ours = pair
    free = [their_tokens(theirs, prompt) for prompt in prompts()]
    stop_ids = [free[0][3], free[3][7]]
    expected = [their_tokens(theirs, prompt, stop_ids=stop_ids) for prompt in prompts()]
    assert len({len(tokens) for tokens in expected}) > 1, "some answers should stop early"
    assert generate(ours, prompts(), max_new_tokens=NEW_TOKENS, stop_ids=stop_ids, batch_size=4) == expected


@pytest.mark.parametrize("pair", ["hybrid", "latent", "llama"], indirect=True)
def test_sampled_batch_equals_one_by_one(pair):
    _, ours = pair
    settings = {"max_new_tokens": NEW_TOKENS, "stop_ids": {5}, "temperature": 1.0, "top_p": 0.9, "seed": 1}
    assert generate(ours, prompts(), batch_size=16, **settings) == generate(ours, prompts(), batch_size=1, **settings)
