"""The catalogue of functions: actions times things, such as book_taxi, with their declarations and the requests that ask for them.

About one function in eight is held out: its action and its thing occur elsewhere, the two together nowhere in training.
The name of a parameter differs from function to function (city, place, town), so that it has to be read from the declaration.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from scripts.make_tiny import words


@dataclass(frozen=True)
class Kind:
    """What a parameter holds: its JSON type, the names that it goes by, and how a value is drawn (open kinds have held-out values)."""

    type: str
    keys: tuple[str, ...]
    make: Callable[[random.Random], str | int]
    open: bool = False

    def draw(self, rng: random.Random, *, held_out: bool | None) -> str | int:
        return words.draw(rng, self.make, held_out=held_out) if self.open else self.make(rng)


@dataclass(frozen=True)
class Tool:
    """One function. `slots` are kinds in the order of the declaration; `requests` name them in braces."""

    name: str
    description: str
    slots: tuple[str, ...]
    requests: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        return words.is_held_out(self.name, one_in=8)

    def key(self, slot: str) -> str:
        """The name by which this function knows `slot`."""
        keys = KINDS[slot].keys
        return keys[zlib.crc32(f"{self.name}.{slot}".encode()) % len(keys)]

    def declaration(self) -> dict:
        """The OpenAI form, as `tools` of a chat row holds it."""
        properties = {self.key(slot): {"type": KINDS[slot].type} for slot in self.slots}
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return {"type": "function", "function": {"name": self.name, "description": self.description, "parameters": parameters}}

    def ask(self, rng: random.Random, *, held_out: bool | None = None) -> tuple[str, dict]:
        """A request in words and the arguments of the call that answers it."""
        values = {slot: KINDS[slot].draw(rng, held_out=held_out) for slot in self.slots}
        return rng.choice(self.requests).format(**values), {self.key(slot): value for slot, value in values.items()}


KINDS = {
    "person": Kind("string", ("name", "person", "guest"), words.person, open=True),
    "friend": Kind("string", ("friend", "recipient"), words.person, open=True),
    "place": Kind("string", ("city", "place", "town"), words.place, open=True),
    "other": Kind("string", ("other_city", "other_place"), words.place, open=True),
    "title": Kind("string", ("title", "subject"), words.title, open=True),
    "day": Kind("string", ("day", "weekday"), lambda rng: rng.choice(words.DAYS)),
    "room": Kind("string", ("room", "location"), lambda rng: rng.choice(words.ROOMS)),
    "people": Kind("integer", ("people", "group_size"), lambda rng: rng.randint(2, 40)),
    "limit": Kind("integer", ("limit", "count"), lambda rng: rng.randint(2, 40)),
    "coins": Kind("integer", ("coins", "amount"), lambda rng: rng.randint(5, 90)),
    "stars": Kind("integer", ("stars", "rating"), lambda rng: rng.randint(1, 5)),
    "level": Kind("integer", ("level", "value"), lambda rng: rng.randint(1, 99)),
    "minutes": Kind("integer", ("minutes", "duration"), lambda rng: rng.randint(2, 60)),
}

# action: (description, slots, requests), all with {thing} to fill in
_SERVICES = {
    "book": ("Book a {thing}", ("person", "place", "day"), (
        "Book a {thing} in {place} for {person} on {day}.", "{person} needs a {thing} in {place} on {day}.",
        "On {day} I want a {thing} for {person} in {place}.")),
    "cancel": ("Cancel a {thing}", ("person", "day"), (
        "Cancel the {thing} of {person} on {day}.", "{person} does not want the {thing} on {day}.", "Please call off the {thing} on {day} for {person}.")),
    "find": ("Find a {thing}", ("place", "limit"), (
        "Find me {limit} offers for a {thing} in {place}.", "Where in {place} is there a {thing}? Show {limit} results.",
        "I am looking for a {thing} in {place}, {limit} answers at most.")),
    "price": ("Price of a {thing}", ("place", "people"), (
        "How much is a {thing} in {place} for {people} people?", "What does a {thing} cost for {people} people in {place}?",
        "We are {people} people in {place}. Is a {thing} expensive?")),
    "rate": ("Rate a {thing}", ("place", "stars"), (
        "Give the {thing} in {place} {stars} stars.", "The {thing} in {place} deserves {stars} stars.", "I rate the {thing} of {place} with {stars} stars.")),
    "pay": ("Pay for a {thing}", ("person", "coins"), (
        "Pay {person} {coins} coins for the {thing}.", "The {thing} costs {coins} coins, pay them to {person}.", "I owe {person} {coins} coins for a {thing}.")),
}  # fmt: skip
_DEVICES = {
    "start": ("Start the {thing}", ("room",), ("Start the {thing} in the {room}.", "Turn on the {thing} in the {room}.", "I want the {thing} in the {room} on.")),
    "stop": ("Stop the {thing}", ("room",), ("Stop the {thing} in the {room}.", "Turn off the {thing} in the {room}.", "I want the {thing} in the {room} off.")),
    "set": ("Set the {thing}", ("room", "level"), (
        "Set the {thing} in the {room} to {level}.", "Change the {thing} in the {room} to level {level}.", "I want the {thing} of the {room} at {level}.")),
    "time": ("Run the {thing} for a time", ("room", "minutes"), (
        "Run the {thing} in the {room} for {minutes} minutes.", "The {thing} in the {room} should run {minutes} minutes.",
        "Give the {thing} in the {room} {minutes} minutes.")),
    "lend": ("Lend the {thing}", ("person", "day"), (
        "Lend the {thing} to {person} on {day}.", "{person} borrows the {thing} on {day}.", "On {day} {person} may have the {thing}.")),
}  # fmt: skip
_PLACES = {
    "show": ("Show the {thing} of a place", ("place",), ("Show me the {thing} of {place}.", "What about the {thing} in {place}?", "Tell me about the {thing} of {place}.")),
    "compare": ("Compare the {thing} of two places", ("place", "other"), (
        "Compare the {thing} of {place} and {other}.", "Is the {thing} of {place} better than that of {other}?", "How does the {thing} in {place} differ from {other}?")),
    "report": ("Report on the {thing} to a person", ("place", "friend"), (
        "Report the {thing} of {place} to {friend}.", "{friend} wants to hear about the {thing} in {place}.", "Let {friend} know about the {thing} of {place}.")),
}  # fmt: skip
_NOTES = {
    "add": ("Add a {thing}", ("title",), ("Add a {thing} called {title}.", "I made a {thing} about the {title}, keep it.", "Save a new {thing}: {title}.")),
    "delete": ("Delete a {thing}", ("title",), ("Delete the {thing} called {title}.", "Remove the {thing} about the {title}.", "Forget the {thing} named {title}.")),
    "send": ("Send a {thing}", ("title", "friend"), (
        "Send {friend} the {thing} called {title}.", "{friend} should get the {thing} about the {title}.", "Mail the {thing} named {title} to {friend}.")),
    "plan": ("Plan a {thing}", ("title", "day"), (
        "Plan a {thing} called {title} for {day}.", "On {day} I will work on the {thing} about the {title}.", "Put the {thing} named {title} on {day}.")),
}  # fmt: skip
_FAMILIES = (
    (_SERVICES, "taxi table boat tour"),
    (_DEVICES, "lamp heater radio"),
    (_PLACES, "weather map news"),
    (_NOTES, "note song recipe"),
)


def _tool(action: str, thing: str, text: str, slots: tuple[str, ...], requests: tuple[str, ...]) -> Tool:
    return Tool(f"{action}_{thing}", text.format(thing=thing), slots, tuple(request.replace("{thing}", thing) for request in requests))


TOOLS = tuple(
    _tool(action, thing, *texts) for actions, things in _FAMILIES for action, texts in actions.items() for thing in things.split()
)
TRAINING_TOOLS = tuple(tool for tool in TOOLS if not tool.held_out)
HELD_OUT_TOOLS = tuple(tool for tool in TOOLS if tool.held_out)


def rivals(rng: random.Random, tool: Tool, pool: tuple[Tool, ...], count: int) -> list[Tool]:
    """`count` other functions to declare beside `tool`; every second one shares its action or its thing."""
    action, thing = tool.name.split("_")
    near = [t for t in pool if t.name != tool.name and (t.name.startswith(action + "_") or t.name.endswith("_" + thing))]
    far = [t for t in pool if t.name != tool.name]
    chosen: list[Tool] = []
    while len(chosen) < count:
        other = rng.choice(near if near and rng.random() < 0.5 else far)
        if other not in chosen:
            chosen.append(other)
    return chosen


def invented(rng: random.Random, thing: str = "") -> Tool:
    """A function outside the catalogue: an action of it with some other thing, such as book_lantern."""
    actions, _ = rng.choice(_FAMILIES)
    action = rng.choice(sorted(actions))
    return _tool(action, thing or rng.choice(words.THINGS), *actions[action])
