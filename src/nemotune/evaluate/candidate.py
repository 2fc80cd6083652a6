"""`Candidate`: a model under evaluation with what it takes to ask it something. Every task is a function of one and the held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemotune.data.progress import progress
from nemotune.data.template import Renderer
from nemotune.evaluate.likelihood import Query, log_probs
from nemotune.generate import generate
from nemotune.models import CausalLM

__all__ = ["Candidate"]

TURN_END = "<|im_end|>"  # spelt in letters, before the stop token, where a tokenizer has no such token


@dataclass(frozen=True)
class Candidate:
    """`label` (base, tuned) names it in progress bars; `batch_size` counts sequences generated together.

    `max_new_tokens` bounds every answer; where it is None, the task says how long one may be.
    """

    model: CausalLM
    renderer: Renderer
    label: str = "model"
    batch_size: int = 32
    max_new_tokens: int | None = None

    def answers(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, what: str) -> list[str]:
        """What the model says greedily to each prompt, without the token that ends it."""
        limit = self.max_new_tokens or max_new_tokens
        stop_ids = self.renderer.stop_ids | set(self.model.config.eos_token_id)
        with progress(f"{what}, {self.label}", total=len(prompts)) as advance:
            outputs = generate(self.model, prompts, max_new_tokens=limit, stop_ids=stop_ids, batch_size=self.batch_size, progress=advance)
        return [self.text(tokens[:-1] if tokens[-1] in stop_ids else tokens).removesuffix(TURN_END) for tokens in outputs]

    def log_probs(self, queries: Sequence[Query], *, what: str) -> list[np.ndarray]:
        """The log probability of each query's targets."""
        with progress(f"{what}, {self.label}", total=len(queries)) as advance:
            return log_probs(self.model, queries, progress=advance)

    def text(self, tokens: Sequence[int]) -> str:
        """The tokens as text, special ones included."""
        return self.renderer.tokenizer.backend_tokenizer.decode(list(tokens), skip_special_tokens=False)
