"""A conversation to tokens and a loss mask, both taken from the chat template itself.

A turn's trained tokens are its full rendering minus the generation prompt rendered with the turn's own thinking mode, up to the token
that ends the turn. That prompt has to be a token prefix of the rendering: it is what the model will be given when it answers, and so
whatever it holds (an inserted `<think></think>`) is never trained on. `{% generation %}` marks, where the template has them, must agree.

A template that rewrites earlier turns when a later user turn arrives (NVIDIA's `truncate_history_thinking`) gives several samples: each
turn is trained as it looked when it was the last one. Nothing is checked after the fact; what does not hold is a RowError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from nemotune.data.chat_template import ChatTemplate, Messages, Rendering
from nemotune.data.example import Example, RowError


@dataclass(frozen=True)
class Turn:
    """The conversation up to one trained turn. prompt, text: rendered; tokens [T] of text, of which [start, end) is trained."""

    prompt: str
    text: str
    tokens: list[int]
    start: int
    end: int


class TurnEncoder:
    """Encodes conversations with one tokenizer and one template. `thinking` is the mode of turns that show none themselves."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, *, thinking: bool) -> None:
        self.tokenizer, self.template, self.thinking = tokenizer, template, thinking
        special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = frozenset(special.values())
        structure = [token for token in special if token in template.source]
        self._structure = re.compile("|".join(map(re.escape, structure))) if structure else None

    def encode(self, text: str) -> list[int]:
        """The tokens of text that a template rendered: its begin-of-text token, if any, is already in it."""
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def samples(self, example: Example) -> list[list[Turn]]:
        """The trained turns, grouped into samples: a group's last turn holds the tokens of all, each turn its own span of them."""
        self._check_structure((*example.messages, *example.tools))
        numbers = [i for i, message in enumerate(example.messages) if message["role"] == "assistant" and message.get("weight") != 0]
        if not numbers:
            raise RowError("no assistant turn to train on")
        groups: list[list[Turn]] = []
        for turn in (self.turn(example, number) for number in numbers):
            if groups and _continues(groups[-1][-1], turn):
                groups[-1].append(turn)
            else:
                groups.append([turn])
        return groups

    def prompt(self, example: Example, number: int) -> str:
        """What the model is given to answer with message `number` (or, past the last message, to go on)."""
        thinking = self._thinking(example, number)
        return self.template.render(example.messages[:number], tools=example.tools, thinking=thinking, prompt=True).text

    def turn(self, example: Example, number: int) -> Turn:
        """Message `number` as the last turn of its conversation. Raises RowError where the mask cannot be trusted."""
        message = example.messages[number]
        prompt = self.prompt(example, number)
        full = self.template.render(example.messages[: number + 1], tools=example.tools, thinking=self._thinking(example, number))
        before, encoding = self.encode(prompt), self.tokenizer.backend_tokenizer.encode(full.text, add_special_tokens=False)
        start = len(before)
        if encoding.ids[:start] != before:
            raise RowError(*_prefix_problem(prompt, full.text, no_reasoning=self.thinking and not _thinks(message)))
        _check_complete(example, number, prompt=prompt, answer=full.text[len(prompt) :])
        end = self._end(encoding.ids, start)
        _check_marks(full, encoding.offsets, start=start, end=end)
        return Turn(prompt, full.text, encoding.ids, start, end)

    def _thinking(self, example: Example, number: int) -> bool:
        """The thinking mode of message `number`: its own where it shows reasoning."""
        return self.thinking or (number < len(example.messages) and _thinks(example.messages[number]))

    def _end(self, tokens: Sequence[int], start: int) -> int:
        """One past the token that ends the turn: the last special one, after which the template may only put white space."""
        end = next((i + 1 for i in range(len(tokens) - 1, start - 1, -1) if tokens[i] in self._special), start)
        if end == start or self.tokenizer.decode(tokens[end:]).strip():
            raise RowError("the template ends the turn without a special token of the tokenizer, so nothing could stop generation")
        return end

    def _check_structure(self, messages: Messages) -> None:
        """A message or tool that spells a token of the template would begin or end turns of its own."""
        found = self._structure and self._structure.search(json.dumps(messages, ensure_ascii=False))
        if found:
            raise RowError("a message holds a token of the template", found[0])


def _thinks(message: dict[str, Any]) -> bool:
    """Whether the turn shows reasoning: in a field of its own, or inside its content."""
    inside = re.search(r"<think>(.*?)</think>", message["content"], re.DOTALL)
    return bool(message.get("reasoning_content", "").strip() or (inside and inside[1].strip()))


def _continues(earlier: Turn, later: Turn) -> bool:
    """Whether the later rendering holds the earlier one unchanged, token for token, up to its end."""
    return later.prompt.startswith(earlier.text) and later.tokens[: earlier.end] == earlier.tokens[: earlier.end]


def _prefix_problem(prompt: str, text: str, *, no_reasoning: bool) -> tuple[str, str]:
    if text.startswith(prompt):
        return "the generation prompt is not a token prefix of the turn", "its last token reaches into the turn"
    if no_reasoning:
        return "a turn has no reasoning_content while data.thinking is on", ""
    return "the generation prompt is not a token prefix of the turn", f"{prompt[-40:]!r} before {text[-60:]!r}"


def _check_complete(example: Example, number: int, *, prompt: str, answer: str) -> None:
    """What the row holds and the template leaves out would be lost without a word."""
    message = example.messages[number]
    for tool in example.tools:
        if tool["function"]["name"] not in prompt:
            raise RowError("the template leaves tools out", tool["function"]["name"])
    for earlier in example.messages[:number]:
        if earlier["role"] != "assistant" and earlier["content"].strip() not in prompt:
            raise RowError(f"the template leaves a {earlier['role']} message out or changes it", earlier["content"].strip()[:60])
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in answer:
            raise RowError("the template leaves tool_calls out", call["function"]["name"])
    if message.get("reasoning_content", "").strip() not in answer:
        raise RowError("the template leaves reasoning_content out")
    if message["content"].rpartition("</think>")[2].strip() not in answer:
        raise RowError("the template leaves an assistant message out or changes it", message["content"].strip()[:60])


def _check_marks(rendering: Rendering, offsets: Sequence[tuple[int, int]], *, start: int, end: int) -> None:
    """`{% generation %}` marks, minus the generation prompt and the white space after the turn, are exactly [start, end)."""
    if rendering.marks is None:
        return
    first, last = rendering.marks[-1] if rendering.marks else (0, 0)
    inside = [first <= offsets[i][0] and offsets[i][1] <= last for i in range(start, len(offsets))]
    trained = end - start
    spaces = all(rendering.text[a:b].isspace() for (a, b), marked in zip(offsets[end:], inside[trained:], strict=True) if marked)
    if not all(inside[:trained]) or not spaces:
        raise RowError("the template's {% generation %} marks disagree with its generation prompt", f"marks {first}:{last}")
