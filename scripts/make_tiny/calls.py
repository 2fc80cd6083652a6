"""The quickstart's rows: conversations in which the assistant should call one of the declared functions, or say that none fits.

Three files: training rows, test rows with the same functions and other names, places and titles, and test rows whose
functions are new as well. Not part of the pretraining text: the base has never seen a call.
"""

from __future__ import annotations

import random

from scripts.make_tiny import words
from scripts.make_tiny.rendering import assistant, user
from scripts.make_tiny.tools import HELD_OUT_TOOLS, KINDS, TOOLS, TRAINING_TOOLS, Tool, rivals

REFUSAL = "None of my functions can do that."
REFUSED = 0.15  # share of the rows in which no declared function fits


def training_rows(rng: random.Random, count: int) -> list[dict]:
    return [_row(rng, TRAINING_TOOLS, TRAINING_TOOLS, held_out=False) for _ in range(count)]


def test_rows(rng: random.Random, count: int) -> list[dict]:
    """Functions of the training rows; each request names a person, place or title that no training row holds (the pretraining text does)."""
    return _grouped([_row(rng, _open(TRAINING_TOOLS), TRAINING_TOOLS, held_out=True) for _ in range(count)], "held-out arguments")


def new_tool_rows(rng: random.Random, count: int) -> list[dict]:
    """Functions that no training row and no pretraining text declares, beside any others; held-out values as in `test_rows`."""
    return _grouped([_row(rng, _open(HELD_OUT_TOOLS), TOOLS, held_out=True) for _ in range(count)], "held-out tools")


def _open(tools: tuple[Tool, ...]) -> tuple[Tool, ...]:
    """Those whose requests can hold a value that training lacks: rooms, days and numbers are lists that both sides share."""
    return tuple(tool for tool in tools if any(KINDS[slot].open for slot in tool.slots))


def _row(rng: random.Random, tools: tuple[Tool, ...], others: tuple[Tool, ...], *, held_out: bool) -> dict:
    tool = rng.choice(tools)
    request, arguments = tool.ask(rng, held_out=held_out)
    shape = rng.random()
    declared = rivals(rng, tool, others, rng.choice((1, 2, 2)))
    if shape < REFUSED:
        messages = [user(request), assistant(REFUSAL)]
    elif shape < 0.9:
        messages = [user(request), _call(tool, arguments)]
    else:
        messages = [user(request), _call(tool, arguments), *_answer(rng, tool, held_out=held_out)]
    if shape >= REFUSED:
        declared.insert(rng.randrange(len(declared) + 1), tool)
    return {"messages": messages, "tools": [t.declaration() for t in declared]}


def _grouped(rows: list[dict], group: str) -> list[dict]:
    """The rows as members of `group`, whose scores the evaluation gives apart."""
    return [row | {"group": group} for row in rows]


def _call(tool: Tool, arguments: dict) -> dict:
    call = {"type": "function", "function": {"name": tool.name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _answer(rng: random.Random, tool: Tool, *, held_out: bool) -> list[dict]:
    """What the function returned, and the assistant's words for it."""
    _action, thing = tool.name.split("_")
    owner = words.draw(rng, words.person, held_out=held_out)
    number = rng.randint(10, 99)
    return [
        {"role": "tool", "content": f"done, number {number}, {owner}"},
        assistant(f"The {thing} is done. Ask {owner} about number {number}."),
    ]
