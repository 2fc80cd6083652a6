"""Words: closed lists, of which names, places and titles have a side: open to the quickstart's training rows, or held out of them.

The side of a value is a hash of the value itself, so that every generator agrees on it without a list. The pretraining text uses
both sides: held out means that no row of the quickstart's training data holds the value. Every name is one token (tokenizer.py).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

COLOURS = tuple("red blue green white black brown grey golden silver pink purple yellow".split())
SIZES = tuple("small big worn new tall round heavy quiet bright cold warm broken".split())
THINGS = tuple(
    "apple basket bell blanket book bottle box bread bucket button candle chair clock coat coin cup drum feather flute glove hammer hat kite "
    "knife lantern leaf letter mirror needle paper pear pencil plate ribbon ring rope scarf shell shoe spoon stone sweater violin wheel".split()
)
ANIMALS = tuple(
    "badger bear beaver cat cow crow deer dog duck fox frog goat goose hare hen horse mole mouse pig rabbit sheep swan wolf wren".split()
)
JOBS = tuple(
    "baker builder captain carpenter clerk cook doctor driver farmer fisher gardener guard miller nurse painter pilot poet potter sailor singer tailor teacher".split()
)
SPOTS = tuple(
    "forest river market harbour garden bridge castle field hill island kitchen library mill road school station tower valley village well".split()
)
ROOMS = tuple("attic bathroom bedroom cellar garage hall kitchen office".split())
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
FEELINGS = tuple("happy sad proud tired afraid hungry angry calm curious lonely".split())
PEOPLE = tuple(
    "Ada Agnes Albert Alice Alma Anna Arthur Astrid Ben Bertha Boris Bruno Carl Carla Cecil Clara Cora Dana David Dora Edgar Edith Eli Ella Elsa Emil "
    "Emma Erik Esther Eva Felix Finn Flora Frank Frida George Gerda Gloria Greta Gustav Hanna Harold Hedda Helen Henry Hilda Hugo Ida Igor Ingrid Irma "
    "Ivan Jack Jacob Jasper Julia Karl Kira Lars Laura Lena Leo Lina Linus Lotte Lucy Magnus Maria Martha Max Mia Milo Mona Nils Nina Noah Nora Olga "
    "Oscar Otto Paul Paula Peter Petra Quentin Ralph Rita Robert Rosa Ruth Sam Sara Selma Simon Sofia Stella Sven Tilda Tom Ulla Vera Victor Walter Wanda Zoe".split()
)
PLACES = tuple(
    "Adelby Alder Amberley Arden Ashford Avon Barrow Bergen Birk Bolton Bremen Brigg Calder Camden Carlow Celle Corby Dalby Danbury Denver Dover Dresden "
    "Dublin Durham Elgin Ely Essen Exeter Falkirk Fargo Galway Genoa Ghent Gotha Hague Halle Hamar Harlow Hexham Hobart Hull Ipswich Jena Kassel Kent Kiel "
    "Lagos Leeds Lima Linz Lisbon London Lund Lyon Madrid Malmo Milan Munich Naples Narvik Norwich Oslo Oxford Paris Perth Porto Prague Quito Reims Riga "
    "Rome Rugby Selby Skara Sofia Tampa Tokyo Toledo Trier Turin Utrecht Vaasa Venice Vienna Warsaw Whitby Windsor Wismar York Zagreb".split()
)


def is_held_out(word: str, *, one_in: int = 5) -> bool:
    """Whether `word` is kept from the quickstart's training rows; about one in `one_in` is."""
    return zlib.crc32(word.encode()) % one_in == 0


def person(rng: random.Random) -> str:
    return rng.choice(PEOPLE)


def place(rng: random.Random) -> str:
    return rng.choice(PLACES)


def title(rng: random.Random) -> str:
    """Two words such as `old violin`."""
    return f"{rng.choice(SIZES + COLOURS)} {rng.choice(THINGS)}"


def number(rng: random.Random) -> str:
    return str(rng.randint(2, 99))


def draw(rng: random.Random, make: Callable[[random.Random], str], *, held_out: bool | None = None) -> str:
    """One value of the wanted side; of either where that is None."""
    while True:
        value = make(rng)
        if held_out is None or is_held_out(value) == held_out:
            return value
