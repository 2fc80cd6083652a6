"""The pretraining text: stories, facts, lists, records, manuals and conversations, full of things said twice.

A model learns to copy from text that repeats itself, and calling a function is mostly copying. There is no function call in
it: what the quickstart teaches is not known before. Names, places and titles come from both sides of words.py; functions only from the training ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from scripts.make_tiny import words
from scripts.make_tiny.rendering import assistant, render, user
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


def _person(rng: random.Random) -> str:
    return words.draw(rng, words.person)


def _place(rng: random.Random) -> str:
    return words.draw(rng, words.place)


def _title(rng: random.Random) -> str:
    return words.draw(rng, words.title)


def _number(rng: random.Random) -> str:
    return str(rng.randint(2, 99))


def _word(rng: random.Random) -> str:
    return rng.choice(WORDS)


def story(rng: random.Random) -> str:
    hero, friend, home = _person(rng), _person(rng), _place(rng)
    job, animal, spot, lost = rng.choice(words.JOBS), rng.choice(words.ANIMALS), rng.choice(words.SPOTS), _title(rng)
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
    about, questions = _place_facts(rng)
    return about + "\n" + "\n".join(f"Question: {question} Answer: {answer}" for question, answer in questions)


def _place_facts(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    place, mayor, number = _place(rng), _person(rng), rng.randint(20, 99)
    animal, spot, colour, other = rng.choice(words.ANIMALS), rng.choice(words.SPOTS), rng.choice(words.COLOURS), _place(rng)
    known = [
        (f"{place} has {number} people.", f"How many people live in {place}?", str(number)),
        (f"The mayor of {place} is {mayor}.", f"Who is the mayor of {place}?", mayor),
        (f"The flag of {place} is {colour} with a {animal}.", f"Which animal is on the flag of {place}?", animal),
        (f"It lies near {other}.", f"Which town is near {place}?", other),
        (f"People in {place} love the {spot}.", f"What do people in {place} love?", f"the {spot}"),
    ]
    said = rng.sample(known, rng.randint(2, 4))
    asked = rng.sample(said, rng.randint(1, 2))
    return " ".join(fact for fact, _, _ in said), [(question, answer) for _, question, answer in asked]


def repeats(rng: random.Random) -> str:
    """A list, and the same list again, laid out anew: a word after a space and one after a line break are different tokens."""
    makers = (_person, _place, _title, _number, _word, lambda r: r.choice(TRAINING_TOOLS).name)
    make = rng.choice((*makers, lambda r: r.choice(makers)(r)))
    items = [make(rng) for _ in range(rng.randint(1, 10))]
    first, again = rng.choices((", ", "\n", " and ", " / ", " "), k=2)
    said = rng.choice(("Again: {}", "Once more:\n{}", "The same list: {}", "({})", '"{}"')).format(again.join(items))
    return f"{first.join(items)}{rng.choice((chr(10), '. ', ' '))}{said}"


def _described(rng: random.Random) -> tuple[str, dict[str, str]]:
    """A sentence and what it says, key by key."""
    person, place, title = _person(rng), _place(rng), _title(rng)
    day, number, room = rng.choice(words.DAYS), str(rng.randint(2, 99)), rng.choice(words.ROOMS)
    return rng.choice((
        (f"{person} travels to {place} on {day}.", {"person": person, "place": place, "day": day}),
        (f"On {day} {person} buys a {title} for {number} coins.", {"day": day, "name": person, "title": title, "coins": number}),
        (f"The {title} lies in the {room}.", {"title": title, "room": room}),
        (f"{number} people in {place} wait for {person}.", {"number": number, "town": place, "person": person}),
        (f"{person} keeps a {title} in {place}.", {"guest": person, "subject": title, "city": place}),
        (f"In {place} the {room} costs {number} coins.", {"city": place, "room": room, "amount": number}),
        (f"{person} met {(friend := _person(rng))} in the {room} on {day}.", {"name": person, "friend": friend, "location": room, "weekday": day}),
        (f"From {place} to {(other := _place(rng))} it takes {number} minutes.", {"place": place, "other_place": other, "minutes": number}),
    ))  # fmt: skip


def record(rng: random.Random) -> str:
    """A sentence, then its content as a form, in one of the ways in which forms are written."""
    sentence, fields = _described(rng)
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


def chat_recall(rng: random.Random) -> str:
    about, questions = _place_facts(rng)
    question, answer = questions[0]
    if rng.random() < 0.2:
        return render([user(f"{about} {question}"), assistant(f"{answer}.", thought=f"It says {about}")])
    turns = [user(f"{about} {question}"), assistant(f"{answer}.")]
    return render(turns + [turn for q, a in questions[1:] for turn in (user(q), assistant(f"{a}."))])


def chat_form(rng: random.Random) -> str:
    """The user names the keys, the assistant fills them in."""
    sentence, fields = _described(rng)
    asked = rng.sample(sorted(fields), rng.randint(1, len(fields)))
    style = rng.choice(("{}: {}", "{}\n{}", "The {} is {}."))
    return render([user(f"{sentence} Write {', '.join(asked)}."), assistant("\n".join(style.format(key, fields[key]) for key in asked))])


def chat_repeat(rng: random.Random) -> str:
    said = rng.choice((_title, _person, _place, lambda r: _described(r)[0], lambda r: f"{_person(r)} {r.randint(2, 999)} {_place(r)}"))(rng)
    ask = rng.choice(("Repeat: {}", "Say this again: {}", "Echo {}", "Write down {}"))
    return render([user(ask.format(said)), assistant(said)])


def chat_order(rng: random.Random) -> str:
    """A request, and what it asks for, named without a function."""
    tool = rng.choice(TRAINING_TOOLS)
    request, arguments = tool.ask(rng)
    asked = rng.sample(sorted(arguments), rng.randint(1, len(arguments)))
    style = rng.choice(("{}: {}", "{}\n{}", "<{0}>\n{1}\n</{0}>"))
    return render([user(f"{request} Write {', '.join(asked)}."), assistant("\n".join(style.format(key, arguments[key]) for key in asked))])


def chat_tools(rng: random.Random) -> str:
    """Functions are declared, and the user asks about them."""
    tool = rng.choice(TRAINING_TOOLS)
    declared = [tool, *rivals(rng, tool, TRAINING_TOOLS, rng.randint(1, 2))]
    rng.shuffle(declared)
    question, answer = rng.choice((
        (f"Which function is there to {tool.description.lower()}?", f"{tool.name}."),
        (f"Which function helps? {tool.ask(rng)[0]}", f"{tool.name}."),
        ("Which functions do you have?", ", ".join(t.name for t in declared) + "."),
        (f"What does {tool.name} need?", ", ".join(tool.key(slot) for slot in tool.slots) + "."),
        (f"What does {tool.name} do?", f"{tool.description}."),
    ))  # fmt: skip
    return render([user(question), assistant(answer)], [t.declaration() for t in declared])


SHARES: dict[Maker, float] = {
    story: 0.06, facts: 0.05, repeats: 0.05, record: 0.08, manual: 0.03, marks: 0.02,
    chat_recall: 0.08, chat_form: 0.16, chat_repeat: 0.05, chat_order: 0.30, chat_tools: 0.12,
}  # fmt: skip
