"""One `<functioncall>` of Glaive, read. It looks like JSON and is not: its arguments stand in single quotes.

    <functioncall> {"name": "get_news", "arguments": '{"country": "France"}'}

Also what rows of the full set hold instead: arguments as a plain object, as a JSON string, null, with an apostrophe inside or a
backslash before it, under the key "parameters", and a brace too many. `evaluate/` reads generated calls with this as well.
"""

from __future__ import annotations

import json
import re
from typing import Any

from nemotune.data.example import RowError

MARK = "<functioncall>"
NAME = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"]+)"\s*')
CLOSING = re.compile(r"'\s*\}")
KEY = re.compile(r',\s*"(arguments|parameters)"\s*:\s*')


def parse_call(text: str, repaired: set[str]) -> dict[str, Any]:
    """The tool call that `text`, what follows the mark, spells; what was mended is added to `repaired`. Raises RowError."""
    name = NAME.match(text)
    if name is None:
        raise RowError("call in an unknown syntax", text.strip()[:60])
    key = KEY.match(text, name.end())
    if key is None:
        arguments, rest = {}, text[name.end() :]
    else:
        if key[1] == "parameters":
            repaired.add('"parameters" for "arguments"')
        arguments, rest = _arguments(text[key.end() :], repaired)
    _close(rest.strip(), repaired)
    return {"type": "function", "function": {"name": name[1], "arguments": _as_object(arguments, repaired)}}


def _arguments(text: str, repaired: set[str]) -> tuple[Any, str]:
    """The arguments' value, and what follows it."""
    if text.startswith("'"):
        ends = [match.start() for match in CLOSING.finditer(text, 1)]  # the last one: apostrophes inside are not escaped
        if not ends:
            raise RowError("truncated call", text[:60])
        return _decode(text[1 : ends[-1]], repaired), text[ends[-1] + 1 :]
    repaired.add("arguments without their quotes")
    return _prefix(text)


def _decode(text: str, repaired: set[str]) -> Any:
    if r"\'" in text:
        repaired.add("escaped apostrophe")
        text = text.replace(r"\'", "'")
    value, rest = _prefix(text)
    if rest.strip():
        if rest.strip() != "}":
            raise RowError("arguments are not JSON", text[:60])
        repaired.add("brace too many")
    return value


def _prefix(text: str) -> tuple[Any, str]:
    """The JSON value at the start of `text`, and the rest. Control characters inside strings are let pass, as upstream writes them."""
    decoder = json.JSONDecoder(strict=False, parse_constant=_not_json)
    stripped = text.lstrip()
    try:
        value, end = decoder.raw_decode(stripped)
    except json.JSONDecodeError as error:
        truncated = error.pos >= len(stripped.rstrip("}' \n")) or error.msg.startswith("Unterminated")
        raise RowError("truncated call" if truncated else "arguments are not JSON", f"{error}: {text[:60]}") from error
    return value, stripped[end:]


def _not_json(name: str) -> Any:
    raise RowError("arguments hold a number that JSON lacks", name)


def _as_object(arguments: Any, repaired: set[str]) -> dict[str, Any]:
    if isinstance(arguments, str):
        arguments = _decode(arguments, repaired)
    if arguments is None:
        repaired.add("arguments are null")
        return {}
    if not isinstance(arguments, dict):
        raise RowError("call arguments are not an object", str(arguments)[:60])
    return arguments


def _close(rest: str, repaired: set[str]) -> None:
    """What follows the arguments must be the call's closing brace alone."""
    if not rest.startswith("}"):
        raise RowError("truncated call", rest[:60])
    after = rest[1:].strip()
    if after == "}":
        repaired.add("brace too many")
    elif after:
        raise RowError("text after a call", after[:60])
