"""Rows of glaiveai/glaive-function-calling-v2: conversations with function calls, as text.

system str: "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -" and one JSON
declaration after another, or "SYSTEM: You are a helpful assistant, with no access to external functions."
chat str: turns that begin "USER:", "ASSISTANT:" or "FUNCTION RESPONSE:", parted by blank lines; an assistant's turn ends " <|endoftext|>"
and may hold `<functioncall> {"name": "f", "arguments": '{"a": 1}'}` (`glaive_call.py` reads those).

What is mended is named in meta["repaired"], what cannot be is a RowError. The sentence before the declarations is left out of the
messages: each template introduces its tools in words of its own, and `chatml.jinja` puts that very sentence back.
"""

from __future__ import annotations

import json
import re
from typing import Any

from nemotune.data.example import Example, RowError
from nemotune.data.formats.glaive_call import MARK, parse_call

TURN = re.compile(r"(?:\A\s*|\n\s*\n\s*)(USER|ASSISTANT|FUNCTION RESPONSE):")
INTRODUCTION = re.compile(r"You are a helpful assistant,? with access to the following functions\. Use them if required\s*-?")
END = "<|endoftext|>"
ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}


def convert(row: dict[str, Any]) -> Example:
    """Messages with tools and tool_calls; there is no raw form."""
    if not isinstance(row.get("system"), str) or not isinstance(row.get("chat"), str):
        raise RowError("no system or chat text", f"the row has {', '.join(row) or 'no keys'}")
    repaired: set[str] = set()
    system, tools = _declarations(row["system"], repaired)
    messages = _turns(row["chat"], repaired)
    _check(messages, tools)
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Example(messages=tuple(messages), tools=tuple(tools), meta={"repaired": sorted(repaired)} if repaired else {})


def _declarations(system: str, repaired: set[str]) -> tuple[str, list[dict[str, Any]]]:
    """The system text without its declarations, and those, each name once."""
    text = system.strip().removeprefix("SYSTEM:").strip()
    start = re.search(r"^\s*\{", text, re.MULTILINE)
    if start is None:
        return text, []
    functions: dict[str, dict[str, Any]] = {}
    position = start.end() - 1
    while position < len(text):
        function, position = _declaration(text, position)
        if function["name"] in functions:
            repaired.add("function declared twice")
        functions.setdefault(function["name"], function)
        position += len(text[position:]) - len(text[position:].lstrip(" \r\n\t,"))
    return INTRODUCTION.sub("", text[: start.start()]).strip(), [{"type": "function", "function": f} for f in functions.values()]


def _declaration(text: str, position: int) -> tuple[dict[str, Any], int]:
    try:
        function, end = json.JSONDecoder(strict=False).raw_decode(text, position)
    except ValueError as error:
        raise RowError("declaration is not JSON", f"{error}: {text[position : position + 60]}") from error
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("declaration without a name", text[position : position + 60])
    return function, end


def _turns(chat: str, repaired: set[str]) -> list[dict[str, Any]]:
    pieces = TURN.split(chat)
    if pieces[0].strip():
        raise RowError("text before the first turn", pieces[0].strip()[:60])
    return [_turn(ROLES[mark], text, repaired) for mark, text in zip(pieces[1::2], pieces[2::2], strict=True)]


def _turn(role: str, text: str, repaired: set[str]) -> dict[str, Any]:
    text = text.strip()
    if role == "assistant":
        text = text.removesuffix(END).strip()
    if END in text:
        repaired.add("stray <|endoftext|>")
        text = text.replace(END, "").strip()
    if role == "assistant":
        return _answer(text, repaired)
    if not text:
        raise RowError(f"empty {role} turn")
    return {"role": role, "content": text}


def _answer(text: str, repaired: set[str]) -> dict[str, Any]:
    said, *calls = text.split(MARK)
    said = said.strip()
    if re.search(r"function_?\s?call", said, re.IGNORECASE) and re.search(r"[<{\[]", said):
        raise RowError("call in an unknown syntax", said[:60])
    if not calls:
        if not said:
            raise RowError("empty assistant turn")
        return {"role": "assistant", "content": said}
    if said:
        repaired.add("text before a call")
    return {"role": "assistant", "content": said, "tool_calls": [parse_call(call, repaired) for call in calls]}


def _check(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
    """What would teach the model wrongly: calls of nothing, answers to nothing."""
    if not messages or messages[0]["role"] != "user":
        raise RowError("first turn is not the user's", messages[0]["role"] if messages else "no turn at all")
    if all(message["role"] != "assistant" for message in messages):
        raise RowError("no assistant turn")
    declared = {tool["function"]["name"] for tool in tools}
    for before, message in zip([{}, *messages], messages, strict=False):
        unknown = [call["function"]["name"] for call in message.get("tool_calls", ()) if call["function"]["name"] not in declared]
        if unknown:
            raise RowError("call of an undeclared function", unknown[0])
        if message["role"] == "tool" and not before.get("tool_calls") and before.get("role") != "tool":
            raise RowError("function response without a call")
