"""Batched generation: all prompts of a batch in one packed row, then one token per sequence and step.

KV, convolution and SSM state per sequence are in the model's cache (models/cache.py); the choice of a token is in sampling.py.
B sequences, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
import torch

from nemotune.errors import DataError
from nemotune.generate.sampling import Sampling
from nemotune.models import CausalLM

__all__ = ["generate", "inference"]


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, in the prompts' order, each up to its first stop token (included) or `max_new_tokens`.

    Prompts of like length share a batch, the longest first, so that what does not fit in memory fails at once. The result
    does not depend on `batch_size`, but for rounding: a matrix product over other rows may flip a near tie.
    `progress` is told how many sequences just ended. Raises DataError for a prompt without tokens.
    """
    if empty := [place for place, prompt in enumerate(prompts) if not prompt]:
        raise DataError(f"prompts[{empty[0]}]: got no tokens, expected at least one; begin it with the tokenizer's beginning-of-text token")
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    longest_first = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    outputs: list[list[int]] = [[] for _ in prompts]
    with inference(model):
        for start in range(0, len(prompts), batch_size):
            places = longest_first[start : start + batch_size]
            ended = _decode(
                model, [prompts[place] for place in places], max_new_tokens=max_new_tokens, stop_ids=stop_ids,
                sampling=sampling, streams=sampling.streams(places), progress=progress or (lambda count: None),
            )  # fmt: skip
            for place, tokens in zip(places, ended, strict=True):
                outputs[place] = tokens
    return outputs


@contextmanager
def inference(model: CausalLM) -> Iterator[None]:
    """Dropout off and no gradients inside the block; the model's mode is put back after it.

    `no_grad` rather than `inference_mode`: tables that a model computes once and keeps must stay usable in training.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _decode(
    model: CausalLM, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Collection[int],
    sampling: Sampling, streams: Sequence[np.random.Generator], progress: Callable[[int], object],
) -> list[list[int]]:  # fmt: skip
    """The new tokens of one batch. A sequence that has ended leaves the cache, so the last long one runs alone."""
    lengths = [len(prompt) for prompt in prompts]
    outputs: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    cache = model.new_cache(len(prompts), max(lengths) + max_new_tokens)
    tokens_T = torch.tensor([token for prompt in prompts for token in prompt], device=model.device)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=model.device)
    for _ in range(max_new_tokens):
        hidden_TD = model(tokens_T, cu_seqlens, cache=cache)
        tokens_T = sampling.choose(model.logits(hidden_TD[cu_seqlens[1:].long() - 1]), [streams[place] for place in running])
        going = _record(tokens_T.tolist(), [outputs[place] for place in running], stop_ids=stop_ids)
        progress(len(running) - len(going))
        if not going:
            return outputs
        if len(going) < len(running):
            rows = torch.tensor(going, device=model.device)
            running, tokens_T = [running[row] for row in going], tokens_T[rows]
            cache.select(rows)
        cu_seqlens = torch.arange(len(running) + 1, dtype=torch.int32, device=model.device)
    progress(len(running))
    return outputs


def _record(tokens: list[int], outputs: list[list[int]], *, stop_ids: Collection[int]) -> list[int]:
    """Append each sequence's token; the rows that go on."""
    for token, output in zip(tokens, outputs, strict=True):
        output.append(token)
    return [row for row, token in enumerate(tokens) if token not in stop_ids]
