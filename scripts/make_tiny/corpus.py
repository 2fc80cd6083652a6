"""The pretraining text: stories, facts, lists, records and manuals, full of things said twice, and the conversations of chats.py.

A model learns to copy from text that repeats itself, and calling a function is mostly copying. There is no function call in
it: what the quickstart teaches is not known before. Names, places and titles come from both sides of words.py; functions only from the training ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from scripts.make_tiny import chats, words
from scripts.make_tiny.facts import described, place_facts
from scripts.make_tiny.rendering import render
from scripts.make_tiny.tools import TRAINING_TOOLS, rivals

WORDS = words.THINGS + words.ANIMALS + words.JOBS + words.SPOTS + words.ROOMS + words.DAYS + words.FEELINGS + words.COLOURS + words.SIZES
Maker = Callable[[random.Random], str]


def documents(rng: random.Random) -> Iterator[str]:
    """Endless documents of about 30 to 200 tokens."""
    makers, shares = zip(*SHARES.items(), strict=True)
    while True:
        yield rng.choices(makers, shares)[0](rng)


def pages(rng: random.Random) -> Iterator[str]:
    """Endless pages of one or two documents."""
    found = documents(rng)
    while True:
        yield "\n".join(next(found) for _ in range(rng.randint(1, 2)))


def _word(rng: random.Random) -> str:
    return rng.choice(WORDS)


def story(rng: random.Random) -> str:
    hero, friend, home = words.person(rng), words.person(rng), words.place(rng)
    job, animal, spot, lost = rng.choice(words.JOBS), rng.choice(words.ANIMALS), rng.choice(words.SPOTS), words.title(rng)
    day, feeling = rng.choice(words.DAYS), rng.choice(words.FEELINGS)
    opening = rng.choice(
        (f"{hero} was a {job} in {home}.", f"In {home} there lived a {job} called {hero}.", f"Once a {job} named {hero} came to {home}.")
    )
    event = rng.choice((
        f"On {day} {hero} lost a {lost} near the {spot}.", f"One {day} a {animal} took the {lost} of {hero} to the {spot}.",
        f"Every {day} {hero} walked to the {spot} with a {lost}, until a {animal} stole it.",
    ))  # fmt: skip
    search = rng.choice(
        (f"{hero} was {feeling} and asked {friend} for help.", f'"Where is my {lost}?" asked {hero}. {friend} did not know.')
    )
    ending = rng.choice((
        f"{friend} found the {lost} at the {spot}, and {hero} was happy again.", f"The {animal} brought the {lost} back to {hero} in {home}.",
        f"So {hero} and {friend} went to the {spot}, and there was the {lost}.",
    ))  # fmt: skip
    return " ".join((opening, event, search, ending))


def facts(rng: random.Random) -> str:
    """A paragraph about a place, then questions whose answers stand in it."""
    about, questions = place_facts(rng)
    return about + "\n" + "\n".join(f"Question: {question} Answer: {answer}" for question, answer in questions)


def repeats(rng: random.Random) -> str:
    """A list, and the same list again, laid out anew: a word after a space and one after a line break are different tokens."""
    makers = (words.person, words.place, words.title, words.number, _word, lambda r: r.choice(TRAINING_TOOLS).name)
    make = rng.choice((*makers, lambda r: r.choice(makers)(r)))
    items = [make(rng) for _ in range(rng.randint(1, 10))]
    first, again = rng.choices((", ", "\n", " and ", " / ", " "), k=2)
    said = rng.choice(("Again: {}", "Once more:\n{}", "The same list: {}", "({})", '"{}"')).format(again.join(items))
    return f"{first.join(items)}{rng.choice((chr(10), '. ', ' '))}{said}"


def record(rng: random.Random) -> str:
    """A sentence, then its content as a form, in one of the ways in which forms are written."""
    sentence, fields = described(rng)
    asked = rng.sample(sorted(fields), rng.randint(1, len(fields)))
    style = rng.choice(("{}: {}", "{} = {}", "<{0}>{1}</{0}>", "<parameter={}> {}", "{}\n{}"))
    return sentence + "\n" + "\n".join(style.format(key, fields[key]) for key in asked)


def manual(rng: random.Random) -> str:
    """Functions described in prose."""
    tool = rng.choice(TRAINING_TOOLS)
    chosen = [tool, *rivals(rng, tool, TRAINING_TOOLS, rng.randint(0, 2))]
    return "\n".join(
        f"{t.name}: {t.description}. It takes {' and '.join(t.key(slot) for slot in t.slots)}. Example: {t.ask(rng)[0]}" for t in chosen
    )


def marks(rng: random.Random) -> str:
    """The marks of the chat format as words of a list, so that none is an untrained token."""
    known = [
        "<tool_call>",
        "</tool_call>",
        "<tool_response>",
        "</tool_response>",
        "<think>",
        "</think>",
        "<tools>",
        "</tools>",
        "<function",
        "</function>",
        "</parameter>",
    ]
    return "Marks: " + " ".join(rng.sample(known, rng.randint(3, len(known))))


def conversation(rng: random.Random) -> str:
    row = chats.row(rng)
    return render(row["messages"], row.get("tools", ()))


SHARES: dict[Maker, float] = {
    story: 0.10, facts: 0.08, repeats: 0.08, record: 0.12, manual: 0.06, marks: 0.04, conversation: 0.52,
}  # fmt: skip
