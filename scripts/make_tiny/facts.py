"""Small worlds in words: sentences and what they say, for the texts of corpus.py and the conversations of chats.py."""

from __future__ import annotations

import random

from scripts.make_tiny import words


def place_facts(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """A paragraph about a place, and questions with the answers that it holds."""
    place, mayor, number = words.place(rng), words.person(rng), rng.randint(20, 99)
    animal, spot, colour, other = rng.choice(words.ANIMALS), rng.choice(words.SPOTS), rng.choice(words.COLOURS), words.place(rng)
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


def described(rng: random.Random) -> tuple[str, dict[str, str]]:
    """A sentence and what it says, key by key."""
    person, place, title = words.person(rng), words.place(rng), words.title(rng)
    day, number, room = rng.choice(words.DAYS), str(rng.randint(2, 99)), rng.choice(words.ROOMS)
    return rng.choice((
        (f"{person} travels to {place} on {day}.", {"person": person, "place": place, "day": day}),
        (f"On {day} {person} buys a {title} for {number} coins.", {"day": day, "name": person, "title": title, "coins": number}),
        (f"The {title} lies in the {room}.", {"title": title, "room": room}),
        (f"{number} people in {place} wait for {person}.", {"number": number, "town": place, "person": person}),
        (f"{person} keeps a {title} in {place}.", {"guest": person, "subject": title, "city": place}),
        (f"In {place} the {room} costs {number} coins.", {"city": place, "room": room, "amount": number}),
        (f"{person} met {(friend := words.person(rng))} in the {room} on {day}.", {"name": person, "friend": friend, "location": room, "weekday": day}),
        (f"From {place} to {(other := words.place(rng))} it takes {number} minutes.", {"place": place, "other_place": other, "minutes": number}),
    ))  # fmt: skip
