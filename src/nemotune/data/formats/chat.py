"""OpenAI-style conversations, as fine-tuning services take them.

messages list of {role, content, ...}: role system | developer | user | assistant | tool | function; content str, null, or text parts
[{"type": "text", "text": ...}]; on assistant turns reasoning_content str, tool_calls [{"function": {"name", "arguments"}}] (arguments an
object or its JSON), or the older function_call; weight 0 leaves an assistant turn out of the loss.
tools list, or its JSON, of {"type": "function", "function": {...}} or bare functions.
group, subject str, optional: scores are also given for each.

Two relatives are read as well: {prompt, completion} in plain text, and ShareGPT's {conversations: [{from, value}], tools}.
"""

from __future__ import annotations

import json
from typing import Any

from nemotune.data.example import Example, RowError, conversation

ROLES = {"developer": "system", "function": "tool", "human": "user", "gpt": "assistant", "observation": "tool"}  # other names of the four


def convert(row: dict[str, Any]) -> Example:
    """Messages and tools in one spelling: arguments as objects, content as text."""
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return _prompted(row["prompt"], row["completion"])
    if isinstance(row.get("conversations"), list):
        messages = tuple(_shared(turn) for turn in row["conversations"])
    elif isinstance(row.get("messages"), list):
        messages = tuple(_message(message) for message in row["messages"])
    else:
        raise RowError("no messages", _instead(row))
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no assistant turn")
    meta = {key: row[key] for key in ("group", "subject") if isinstance(row.get(key), str)}
    return Example(messages=messages, tools=_tools(row.get("tools") or row.get("functions")), meta=meta)


def _instead(row: dict[str, Any]) -> str:
    """What the row has where a list of messages should be."""
    for key in ("messages", "conversations"):
        if row.get(key) is not None:
            kind = "text" if isinstance(row[key], str) else type(row[key]).__name__
            return f"'{key}' is {kind}, expected a list" + (", which a .csv cannot hold: use JSON lines" if kind == "text" else "")
    return f"the row has {', '.join(row) or 'no keys'}"


def _prompted(prompt: str, completion: str) -> Example:
    if not prompt.strip() or not completion.strip():
        raise RowError("empty prompt" if not prompt.strip() else "empty completion")
    turns = conversation(("user", prompt.strip()), ("assistant", completion.strip()))
    bare = prompt.rstrip(" ")
    return Example(messages=turns, prompt=bare, completion=prompt[len(bare) :] + completion)


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowError("message without a role", str(message)[:60])
    role = ROLES.get(message["role"], message["role"])
    if role not in ("system", "user", "assistant", "tool"):
        raise RowError("unknown role", role)
    kept: dict[str, Any] = {"role": role, "content": _content(message.get("content"))}
    if role == "assistant":
        kept |= _answer(message)
        if not kept["content"] and "tool_calls" not in kept and "reasoning_content" not in kept:
            raise RowError("empty assistant turn")
    return kept


def _answer(message: dict[str, Any]) -> dict[str, Any]:
    """What only an assistant's turn has."""
    kept: dict[str, Any] = {}
    reasoning = message.get("reasoning_content") or message.get("reasoning") or message.get("thinking")
    if reasoning:
        kept["reasoning_content"] = _content(reasoning)
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if calls:
        kept["tool_calls"] = [_call(call) for call in calls]
    if message.get("weight") == 0:
        kept["weight"] = 0
    return kept


def _content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    raise RowError("content is not text", str(content)[:60])


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("call without a name", str(call)[:60])
    arguments = _parsed(function.get("arguments") or {}, "call arguments")
    if not isinstance(arguments, dict):
        raise RowError("call arguments are not an object", str(arguments)[:60])
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(tools: Any) -> tuple[dict[str, Any], ...]:
    declared = _parsed(tools or [], "tools")
    if not isinstance(declared, list):
        raise RowError("tools are not a list", str(declared)[:60])
    functions = [tool.get("function", tool) if isinstance(tool, dict) else None for tool in declared]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        raise RowError("tool without a name", str(declared)[:60])
    return tuple({"type": "function", "function": function} for function in functions)


def _shared(turn: Any) -> dict[str, Any]:
    """A ShareGPT turn; `function_call` is an assistant's turn whose value is the call, or a list of calls."""
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
        raise RowError("message without a role", str(turn)[:60])
    if turn["from"] != "function_call":
        return _message({"role": turn["from"], "content": turn.get("value")})
    calls = _parsed(turn.get("value"), "function_call")
    return _message({"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]})


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_not_json)
    except ValueError as error:
        raise RowError(f"{what} are not JSON", f"{error}: {value[:60]}") from error


def _not_json(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
