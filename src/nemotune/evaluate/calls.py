"""Tool calls as models write them, read into (name, arguments); and arguments made comparable by the declared schema.

Read are Nemotron-3's XML, JSON in <tool_call> (Hermes, Qwen) or <TOOLCALL> (Nemotron Nano v1, v2), Glaive's <functioncall>, and
Llama-3.1's bare JSON. Not here: which turns are asked and what is scored (tool_calls.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemotune.data.example import RowError
from nemotune.data.formats.glaive_call import MARK, parse_call

__all__ = ["Call", "Reply", "parse_reply", "typed"]

BARE = r"""\A\s*\[?\s*\{\s*"(name"\s*:|type"\s*:\s*"function")"""
ATTEMPT = re.compile(rf"<tool_call>|<TOOLCALL>|<functioncall>|<function=|<\|python_tag\|>|{BARE}")
TAGGED = re.compile(r"<(tool_call|TOOLCALL)>(.*?)</\1>", re.DOTALL)
FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)

PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}  # what NVIDIA's template makes of JSON's


@dataclass(frozen=True)
class Call:
    """`arguments` are as written: of the XML syntax, text."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """`attempted`: the text sets out to call something. `calls` are empty where it does not, or where what it wrote cannot be read."""

    attempted: bool
    calls: tuple[Call, ...] = ()


def parse_reply(text: str) -> Reply:
    """What an answer calls; a thought before it does not count."""
    text = text.rpartition("</think>")[2]
    if not ATTEMPT.search(text):
        return Reply(attempted=False)
    try:
        return Reply(attempted=True, calls=tuple(_calls(text)))
    except (ValueError, RowError, RecursionError):
        return Reply(attempted=True)


def _calls(text: str) -> list[Call]:
    """All calls of the text, in the syntax of its first mark. Raises ValueError or RowError where one cannot be read."""
    if MARK in text:
        written = [parse_call(piece.strip(), set())["function"] for piece in text.split(MARK)[1:]]
        return [Call(function["name"], function["arguments"]) for function in written]
    if "<tool_call>" in text or "<TOOLCALL>" in text:
        blocks = [match[2] for match in TAGGED.finditer(text)]
        if text.count("<tool_call>") + text.count("<TOOLCALL>") != len(blocks):
            raise ValueError("a call that is not closed")
        return [call for block in blocks for call in (_xml(block) if "<function=" in block else _json(block))]
    return _json(text.replace("<|python_tag|>", ""))


def _xml(block: str) -> list[Call]:
    functions = list(FUNCTION.finditer(block))
    if not functions or FUNCTION.sub("", block).strip() or any(PARAMETER.sub("", function[2]).strip() for function in functions):
        raise ValueError("text outside the tags of a call")
    return [Call(function[1].strip(), {p[1].strip(): p[2] for p in PARAMETER.finditer(function[2])}) for function in functions]


def _json(text: str) -> list[Call]:
    """Calls as objects, one after another (Llama parts them with `;`) or in a list."""
    decoder = json.JSONDecoder(strict=False)
    calls: list[Call] = []
    rest = text.strip()
    while rest:
        value, end = decoder.raw_decode(rest)
        calls += [_object(item) for item in (value if isinstance(value, list) else [value])]
        rest = rest[end:].lstrip(" \n\t\r;")
    return calls


def _object(value: Any) -> Call:
    function = value.get("function", value) if isinstance(value, dict) else {}
    if not isinstance(function, dict):
        function = value
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(function.get("name"), str) or not isinstance(arguments, dict | None):
        raise ValueError("a call needs a name and an object of arguments")
    return Call(function["name"], arguments or {})


def typed(call: Call, tools: Sequence[dict[str, Any]]) -> Call:
    """The call with its arguments in the types that `tools` declare: the text `5` of an XML call equals the number 5 of a row."""
    declared: dict[str, Any] = next((tool["function"] for tool in tools if tool["function"]["name"] == call.name), {})
    parameters = declared.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    schemas = properties if isinstance(properties, dict) else {}
    return Call(call.name, {key: _typed(value, schemas.get(key)) for key, value in call.arguments.items()})


def _typed(value: Any, schema: Any) -> Any:
    """Text of a declared string stays text; other text that spells JSON is read, and so a row's own values are on both sides."""
    kinds = schema.get("type") if isinstance(schema, dict) else None
    is_text = "string" in (kinds if isinstance(kinds, list) else [kinds])
    if isinstance(value, str):
        value = PYTHON_WORDS.get(value.strip(), value)
        return value if is_text else _plain(_read(value))
    return json.dumps(_plain(value), ensure_ascii=False) if is_text else _plain(value)


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _plain(value: Any) -> Any:
    """JSON has one kind of number: 1.0 is 1, at any depth."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value
