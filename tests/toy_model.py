"""A toy language model with the interface of `models/`: its next token depends on everything its own document has said so far."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import nn

STATES = 97


class ToyCache:
    def __init__(self, batch_size: int, max_length: int) -> None:
        self.states, self.lengths, self.max_length = [0] * batch_size, [0] * batch_size, max_length

    def select(self, rows) -> None:
        self.states = [self.states[row] for row in rows.tolist()]
        self.lengths = [self.lengths[row] for row in rows.tolist()]


class ToyModel(nn.Module):
    """state = 31 x state + token + 1 (mod 97); logits are a row of a fixed random table. The state is the whole cache."""

    def __init__(self, *, vocab_size: int = 23, eos_token_id: tuple[int, ...] = (2,)) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, eos_token_id=eos_token_id)
        generator = torch.Generator().manual_seed(0)
        self.hidden = nn.Parameter(torch.randn(STATES, 8, generator=generator))
        self.head = nn.Parameter(torch.randn(vocab_size, 8, generator=generator))
        self.calls: list[int] = []

    @property
    def device(self) -> torch.device:
        return self.head.device

    def new_cache(self, batch_size: int, max_length: int) -> ToyCache:
        return ToyCache(batch_size, max_length)

    def forward(self, tokens_T, cu_seqlens, positions=None, cache=None):
        self.calls.append(len(tokens_T))
        states = []
        for document, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            state = cache.states[document] if cache else 0
            for token in tokens_T[start:end].tolist():
                state = (31 * state + token + 1) % STATES
                states.append(state)
            if cache:
                cache.states[document] = state
                cache.lengths[document] += end - start
                assert cache.lengths[document] <= cache.max_length
        return self.hidden[torch.tensor(states, dtype=torch.long)]

    def logits(self, hidden_ND):
        return hidden_ND.float() @ self.head.T


def spell(model: ToyModel, prompt: list[int], *, max_new_tokens: int, stop_ids=()) -> list[int]:
    """Greedy continuation of one prompt without a cache, one forward over everything per token."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        hidden = model(torch.tensor(tokens), torch.tensor([0, len(tokens)], dtype=torch.int32))
        tokens.append(int(model.logits(hidden[-1:]).argmax()))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


class Parrot(ToyModel):
    """Knows some documents by heart: after any prefix of one it says that document's next token, after anything else `lost`."""

    def __init__(self, documents, *, vocab_size: int, eos_token_id: tuple[int, ...], lost: int = 0) -> None:
        super().__init__(vocab_size=vocab_size, eos_token_id=eos_token_id)
        self.lost = lost
        self.next_token = {}
        for tokens in documents:
            state = 0
            for token, following in pairwise(tokens):
                state = hash((state, token))
                self.next_token[state] = following

    def forward(self, tokens_T, cu_seqlens, positions=None, cache=None):
        said = []
        for document, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            state = cache.states[document] if cache else 0
            for token in tokens_T[start:end].tolist():
                state = hash((state, token))
                said.append(self.next_token.get(state, self.lost))
            if cache:
                cache.states[document] = state
        return torch.tensor(said, dtype=torch.float32)[:, None]

    def logits(self, hidden_ND):
        return 30.0 * torch.nn.functional.one_hot(hidden_ND[:, 0].long(), self.config.vocab_size)
