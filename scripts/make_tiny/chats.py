"""Conversations for the base: about small worlds and about declared functions, which are named and filled in but never called.

They are part of the pretraining text, and alone the rows of the second stage (instruct.yaml), in which only the assistant's words are
trained on. Half of the functions are invented on the spot: their names have to be read from the declaration.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

from scripts.make_tiny import words
from scripts.make_tiny.facts import described, place_facts
from scripts.make_tiny.rendering import assistant, user
from scripts.make_tiny.tools import TRAINING_TOOLS, Tool, invented, rivals

Maker = Callable[[random.Random], dict]
REFUSAL = "Nothing here fits."


def row(rng: random.Random) -> dict:
    """One conversation as a chat row: `messages`, and `tools` where functions are declared."""
    makers, shares = zip(*SHARES.items(), strict=True)
    return rng.choices(makers, shares)[0](rng)


def rows(rng: random.Random) -> Iterator[dict]:
    """Endless conversations."""
    while True:
        yield row(rng)


def recall(rng: random.Random) -> dict:
    """Questions about a paragraph, sometimes with a thought."""
    about, questions = place_facts(rng)
    question, answer = questions[0]
    if rng.random() < 0.2:
        return _row(user(f"{about} {question}"), assistant(f"{answer}.", thought=f"It says {about}"))
    turns = [user(f"{about} {question}"), assistant(f"{answer}.")]
    return _row(*turns, *[turn for q, a in questions[1:] for turn in (user(q), assistant(f"{a}."))])


def form(rng: random.Random) -> dict:
    """The user says something and names keys, the assistant fills them in."""
    sentence, fields = described(rng)
    return _filled(rng, sentence, fields)


def order(rng: random.Random) -> dict:
    """The same for a request of the kind that a function answers."""
    return _filled(rng, *_tool(rng).ask(rng))


def repeat(rng: random.Random) -> dict:
    makers = (
        words.title,
        words.person,
        words.place,
        lambda r: described(r)[0],
        lambda r: f"{words.person(r)} {r.randint(2, 999)} {words.place(r)}",
    )
    said = rng.choice(makers)(rng)
    ask = rng.choice(("Repeat: {}", "Say this again: {}", "Echo {}", "Write down {}"))
    return _row(user(ask.format(said)), assistant(said))


def about_tools(rng: random.Random) -> dict:
    """Functions are declared, and the user asks about them."""
    tool = _tool(rng)
    declared = _declared(rng, tool, _rivals(rng, tool, rng.randint(1, 2)))
    question, answer = rng.choice((
        (f"Which function is there to {tool.description.lower()}?", f"{tool.name}."),
        (f"Which function helps? {tool.ask(rng)[0]}", f"{tool.name}."),
        ("Which functions do you have?", ", ".join(t.name for t in declared) + "."),
        (f"What does {tool.name} need?", ", ".join(tool.key(slot) for slot in tool.slots) + "."),
        (f"What does {tool.name} do?", f"{tool.description}."),
    ))  # fmt: skip
    return _row(user(question), assistant(answer), tools=declared)


def use(rng: random.Random) -> dict:
    """The assistant says which function it would use and with what: in words, line by line, as code or as JSON."""
    tool = _tool(rng)
    request, arguments = tool.ask(rng)
    style, said = rng.choice((
        ("in words", f"{tool.name} with {' and '.join(f'{key} {value}' for key, value in arguments.items())}."),
        ("line by line", "\n".join((tool.name, *(f"{key}\n{value}" for key, value in arguments.items())))),
        ("as code", f"{tool.name}({', '.join(f'{key}={json.dumps(value)}' for key, value in arguments.items())})"),
        ("as JSON", json.dumps({"use": tool.name, "with": arguments})),
    ))  # fmt: skip
    declared = _rivals(rng, tool, rng.choice((1, 2, 2)))
    if rng.random() < 0.08:
        said = REFUSAL
    else:
        declared = _declared(rng, tool, declared)
    ask = rng.choice(("{0} What would you use? Say it {1}.", "Say {1} what you would use: {0}"))
    return _row(user(ask.format(request, style)), assistant(said), tools=declared)


def _tool(rng: random.Random) -> Tool:
    return rng.choice(TRAINING_TOOLS) if rng.random() < 0.5 else invented(rng)


def _rivals(rng: random.Random, tool: Tool, count: int) -> list[Tool]:
    thing = tool.name.split("_")[1]
    cousins = [invented(rng, thing if thing in words.THINGS else "") for _ in range(6)]
    return rivals(rng, tool, (*TRAINING_TOOLS, *cousins), count)


def _declared(rng: random.Random, tool: Tool, others: list[Tool]) -> list[Tool]:
    at = rng.randrange(len(others) + 1)
    return [*others[:at], tool, *others[at:]]


def _filled(rng: random.Random, said: str, fields: dict) -> dict:
    asked = rng.sample(sorted(fields), rng.randint(1, len(fields)))
    style = rng.choice(("{}: {}", "{}\n{}", "The {} is {}.", "<{0}>\n{1}\n</{0}>"))
    return _row(user(f"{said} Write {', '.join(asked)}."), assistant("\n".join(style.format(key, fields[key]) for key in asked)))


def _row(*messages: dict, tools: list[Tool] | None = None) -> dict:
    return {"messages": list(messages)} | ({"tools": [tool.declaration() for tool in tools]} if tools else {})


SHARES: dict[Maker, float] = {use: 0.45, order: 0.20, form: 0.16, about_tools: 0.09, recall: 0.07, repeat: 0.03}
