"""Tool calls: every assistant turn of a conversation with tools is asked for anew, on the conversation before it, and compared.

call_decision: calls where the row calls, answers where it answers (every turn). Over the turns that call: valid_call, what it wrote
can be read; name, the called functions; arguments; exact, both. Several calls of a turn are compared without order, arguments as
parsed JSON in the types that the tools declare. The words of an answer are not judged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from nemotune.data.example import Example
from nemotune.data.template import Renderer
from nemotune.errors import DataError
from nemotune.evaluate.calls import Call, parse_reply, typed
from nemotune.evaluate.candidate import Candidate
from nemotune.evaluate.rows import HeldOut, Row, groups_of

__all__ = ["askable", "score", "scores"]

MAX_NEW_TOKENS = 256


def askable(held_out: HeldOut, renderer: Renderer) -> list[tuple[Example, int]]:
    """The assistant turns that are asked for. Raises DataError where no held-out conversation has tools."""
    turns = [(example, number) for example in held_out.examples if example.tools for number in _assistant_turns(example)]
    if not turns:
        raise DataError(
            "evaluate.tasks: tool_calls needs conversations with tools, and none of the held-out rows has any; use data.format: glaive or chat, or another task"
        )
    return turns


def score(candidate: Candidate, held_out: HeldOut) -> list[Row]:
    """One row per assistant turn. Raises DataError as `askable` does."""
    turns = askable(held_out, candidate.renderer)
    prompts = [candidate.renderer.prompt_tokens(example, turn=number) for example, number in turns]
    replies = candidate.answers(prompts, max_new_tokens=MAX_NEW_TOKENS, what="tool calls")
    return [
        _row(example, number, prompt=candidate.text(prompt), prediction=reply)
        for (example, number), prompt, reply in zip(turns, prompts, replies, strict=True)
    ]


def scores(prediction: str, *, calls: Sequence[Call], tools: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The metrics of one reply against the row's own `calls` (none where it answers in words)."""
    reply = parse_reply(prediction)
    if not calls:
        return {"call_decision": float(not reply.attempted)}
    said, right = [typed(call, tools) for call in reply.calls], [typed(call, tools) for call in calls]
    return {
        "call_decision": float(reply.attempted),
        "valid_call": float(bool(said)),
        "name": float(sorted(call.name for call in said) == sorted(call.name for call in right)),
        "arguments": float(_canonical(call.arguments for call in said) == _canonical(call.arguments for call in right)),
        "exact": float(_canonical(map(vars, said)) == _canonical(map(vars, right))),
    }


def _assistant_turns(example: Example) -> list[int]:
    """The turns that training learns from; one of weight 0 is history only."""
    return [number for number, message in enumerate(example.messages) if message["role"] == "assistant" and message.get("weight") != 0]


def _row(example: Example, number: int, *, prompt: str, prediction: str) -> Row:
    message = example.messages[number]
    calls = [Call(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    return Row(
        task="tool_calls",
        row=example.meta["row"],
        part=number,
        scores=scores(prediction, calls=calls, tools=example.tools),
        groups={**groups_of(example), "turn": "calls" if calls else "answers"},
        prompt=prompt,
        expected="\n".join(json.dumps(vars(call), ensure_ascii=False) for call in calls) or message["content"],
        prediction=prediction,
    )


def _canonical(values: Iterable[Any]) -> list[str]:
    """Equal for equal values in any order, and True apart from 1."""
    return sorted(map(_text, values))


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
