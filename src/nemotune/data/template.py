"""`Renderer`: an Example to tokens with their loss mask, and to the prompt that the model will be given. The same code for both.

With `data.template: none` an Example is its raw prompt and completion, otherwise its messages in a chat template (`turns.py`). Plain
text has no messages and is always raw. Not here: limits of length, counting, files (`prepare.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast

from nemotune.data.chat_template import choose_template
from nemotune.data.example import Example, RowError
from nemotune.data.turns import TurnEncoder
from nemotune.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """tokens [T]; mask [T], True where the token itself is a trained target."""

    tokens: list[int]
    mask: list[bool]


class Renderer:
    """Renders Examples for one tokenizer. Can be sent to another process.

    template: model | none | chatml | a Jinja file; thinking: the mode of turns that show no reasoning of their own;
    train_on: assistant (what the model has to say) | all (every token).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, template: str = "model", thinking: bool = False, train_on: str = "assistant"
    ) -> None:
        self.tokenizer, self.train_on = tokenizer, train_on
        chosen = None if template == "none" else choose_template(tokenizer, template)
        self.template_name = chosen.name if chosen else "none"
        self.chat_template = chosen.source if chosen else None
        self._turns = TurnEncoder(tokenizer, chosen, thinking=thinking) if chosen else None

    def encode(self, example: Example) -> list[Encoded]:
        """The example's samples: one, or several where the template rewrites history. Raises RowError."""
        if self._is_raw(example):
            return [self._raw(example)]
        samples = self._turns.samples(example)  # type: ignore[union-attr]
        if self.train_on == "all":
            tokens = samples[-1][-1].tokens
            return [Encoded(tokens, [True] * len(tokens))]
        return [_masked(turns[-1].tokens[: turns[-1].end], [(turn.start, turn.end) for turn in turns]) for turns in samples]

    def prompt_tokens(
        self, example: Example | Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = (), *, turn: int | None = None
    ) -> list[int]:
        """What the model is given, token for token as in training.

        `turn` is the number of the message to be answered; None is the last one if it is the assistant's, else what comes after all.
        """
        if not isinstance(example, Example):
            example = Example(messages=tuple(example), tools=tuple(tools))
        if self._is_raw(example):
            return self._bos + self._encode(example.prompt)
        if turn is None:
            turn = len(example.messages) - (example.messages[-1]["role"] == "assistant")
        return self._turns.encode(self._turns.prompt(example, turn))  # type: ignore[union-attr]

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's end of text, and whatever the template ends a turn with. Raises DataError."""
        stops = {self.tokenizer.eos_token_id} - {None}
        if self._turns:
            probe = Example(messages=({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}))
            try:
                turn = self._turns.turn(probe, 1)
            except RowError as error:
                raise DataError(
                    f"data.template: {self.template_name}, asked for a greeting and its answer: {error}; choose another"
                ) from error
            stops.add(turn.tokens[turn.end - 1])
        return frozenset(stops)

    def digest(self) -> str:
        """A hash of everything that decides which tokens a row becomes: the tokenizer's content and the template's text."""
        tokenizer = self.tokenizer.backend_tokenizer.to_str() + repr(sorted(self.tokenizer.special_tokens_map.items()))
        return hashlib.sha256(f"{tokenizer}\0{self.chat_template}".encode()).hexdigest()

    def _is_raw(self, example: Example) -> bool:
        if self._turns is None and example.messages and not example.completion:
            raise RowError("no raw prompt, which data.template: none needs", "the format gives messages only")
        return self._turns is None or not example.messages

    def _raw(self, example: Example) -> Encoded:
        """Begin-of-text where the tokenizer adds it, prompt, completion, end-of-text.

        Prompt and completion are tokenised apart: the model is given the prompt's tokens and answers with tokens of its own, so none
        may reach across, as `:` and a following letter could in one string. The space belongs to the completion (" B" is one token).
        """
        if self.tokenizer.eos_token_id is None:
            raise DataError("model.path: its tokenizer has no end-of-text token, so a raw text could not end; choose data.template: chatml")
        prompt = self._bos + self._encode(example.prompt)
        tokens = [*prompt, *self._encode(example.completion), self.tokenizer.eos_token_id]
        return _masked(tokens, [(0 if self.train_on == "all" else len(prompt), len(tokens))])

    def _encode(self, text: str) -> list[int]:
        """The tokens of a text as it stands: a special token that it spells (`</s>`, `<unk>`) is letters, and neither begins nor ends anything."""
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        try:
            return backend.encode(text, add_special_tokens=False).ids
        finally:
            backend.encode_special_tokens = False  # one tokenizer serves the templates too, which write such tokens

    @cached_property
    def _bos(self) -> list[int]:
        """The begin-of-text token, where this tokenizer puts one before a text."""
        first = self.tokenizer.backend_tokenizer.encode("", add_special_tokens=True).ids[:1]
        return first if first == [self.tokenizer.bos_token_id] else []


def _masked(tokens: list[int], spans: Sequence[tuple[int, int]]) -> Encoded:
    mask = [False] * len(tokens)
    for start, end in spans:
        mask[start:end] = [True] * (end - start)
    return Encoded(tokens, mask)
