"""Log probabilities of given tokens at given positions, many documents in one packed forward.

What multiple_choice (letters after a prompt) and perplexity (every supervised token) have in common. Only the positions asked about reach
the head, a chunk at a time: one row of logits is 131,072 wide.
N positions, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from nemotune.generate import inference
from nemotune.models import CausalLM

__all__ = ["Query", "log_probs"]


@dataclass(frozen=True)
class Query:
    """For each i: how likely is `targets[i]` right after `tokens[: positions[i] + 1]`?"""

    tokens: Sequence[int]
    positions: Sequence[int]
    targets: Sequence[int]


def log_probs(
    model: CausalLM,
    queries: Sequence[Query],
    *,
    tokens_per_batch: int = 4096,
    chunk_positions: int = 256,
    progress: Callable[[int], object] | None = None,
) -> list[np.ndarray]:
    """Per query the natural log probability of each target (fp32), in order. `progress` is told how many queries were answered."""
    answers: list[np.ndarray] = []
    with inference(model):
        for batch in _batches(queries, tokens_per_batch):
            answers += _answer(model, batch, chunk_positions=chunk_positions)
            if progress:
                progress(len(batch))
    return answers


def _batches(queries: Sequence[Query], tokens_per_batch: int) -> Iterator[list[Query]]:
    """Runs of queries of at most `tokens_per_batch` tokens; a longer one stands alone."""
    batch: list[Query] = []
    size = 0
    for query in queries:
        if batch and size + len(query.tokens) > tokens_per_batch:
            yield batch
            batch, size = [], 0
        batch.append(query)
        size += len(query.tokens)
    if batch:
        yield batch


def _answer(model: CausalLM, batch: list[Query], *, chunk_positions: int) -> list[np.ndarray]:
    borders = [0, *accumulate(len(query.tokens) for query in batch)]
    tokens_T = torch.tensor([int(token) for query in batch for token in query.tokens], device=model.device)
    positions_N = torch.tensor(
        [start + int(p) for start, query in zip(borders, batch, strict=False) for p in query.positions], device=model.device
    )
    targets_N = torch.tensor([int(target) for query in batch for target in query.targets], device=model.device)
    hidden_TD = model(tokens_T, torch.tensor(borders, dtype=torch.int32, device=model.device))
    chunks = zip(torch.split(hidden_TD[positions_N], chunk_positions), torch.split(targets_N, chunk_positions), strict=True)
    answers_N = torch.cat([_gather(model.logits(hidden_ND), targets) for hidden_ND, targets in chunks]).cpu().numpy()
    ends = list(accumulate(len(query.targets) for query in batch))
    return [answers_N[end - len(query.targets) : end] for end, query in zip(ends, batch, strict=True)]


def _gather(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    # fp32: the loss is always computed in it
    return logits_NV.float().log_softmax(-1).gather(1, targets_N[:, None])[:, 0]
