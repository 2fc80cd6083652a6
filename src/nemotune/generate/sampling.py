"""How the next token is chosen from logits: greedily, or from the nucleus of a tempered distribution.

Each sequence draws from a stream of its own, so what it says does not depend on which others share its batch.
batch.py calls this once per step.
B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy; `top_p` keeps the fewest likeliest tokens whose probability reaches it, `top_k` at most so many."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature: got {self.temperature}, expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected more than 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: got {self.top_k}, expected at least 1, or None for no limit")

    def streams(self, places: Sequence[int]) -> list[np.random.Generator]:
        """One random stream per sequence, from the seed and the sequence's place in the caller's list."""
        return [np.random.default_rng((self.seed, place)) for place in places]

    def choose(self, logits_BV: Tensor, streams: Sequence[np.random.Generator]) -> Tensor:
        """The next token of each sequence (int64, [B]); takes one draw from each stream unless greedy."""
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        draws_B = torch.tensor([stream.random() for stream in streams], dtype=torch.float64, device=logits_BV.device)
        return self._inverse_cdf(logits_BV.double() / self.temperature, draws_B)

    def _inverse_cdf(self, logits_BV: Tensor, draws_B: Tensor) -> Tensor:
        """The token at which each row's cumulative probability, over what top_k and top_p leave, first exceeds its draw.

        fp64: a sum over 131,072 fp32 probabilities can miss 1 by more than the rarest of them.
        """
        logits_BV, tokens_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        probs_BV = logits_BV[:, : self.top_k].softmax(-1)
        before_BV = probs_BV.cumsum(-1) - probs_BV
        cdf_BV = probs_BV.masked_fill(before_BV >= self.top_p, 0).cumsum(-1)
        place_B1 = (cdf_BV <= draws_B[:, None] * cdf_BV[:, -1:]).sum(-1, keepdim=True)
        return tokens_BV.gather(1, place_B1)[:, 0]
