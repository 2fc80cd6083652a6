"""Glaive rows, and each oddity that the full set is known to hold."""

from __future__ import annotations

import json

import pytest

from nemotune.data.example import RowError
from nemotune.data.formats.glaive import convert

WITHOUT = "SYSTEM: You are a helpful assistant, with no access to external functions.\n\n"


def spec(name):
    return json.dumps({"name": name, "description": "d", "parameters": {"type": "object", "properties": {}}}, indent=4)


def system(*names):
    head = "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
    return head + "\n".join(map(spec, names)) + "\n"


def row(call, *, name="find", after=""):
    chat = f"USER: Find it\n\n\nASSISTANT: {call} <|endoftext|>\n\n\nFUNCTION RESPONSE: {{}}\n\n\nASSISTANT: Found. <|endoftext|>\n\n\n"
    return {"system": system(name), "chat": chat + after}


def call_of(text, **kwargs):
    example = convert(row(text, **kwargs))
    (call,) = example.messages[1]["tool_calls"]
    return call["function"]["arguments"], example.meta.get("repaired", [])


def reason(raw):
    with pytest.raises(RowError) as error:
        convert(raw)
    return error.value.reason


def test_row_becomes_messages_with_tools_and_calls():
    example = convert(row("""<functioncall> {"name": "find", "arguments": '{"what": "keys", "where": {"room": 2}}'}"""))
    assert [message["role"] for message in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "find", "arguments": {"what": "keys", "where": {"room": 2}}}}
    ]
    assert example.tools == ({"type": "function", "function": json.loads(spec("find"))},)
    assert example.meta == {}


def test_row_without_functions_keeps_its_system_sentence_and_two_line_turns():
    example = convert(
        {
            "system": WITHOUT,
            "chat": "USER: Hi\n\nASSISTANT: Hello.\n\nHow are you? <|endoftext|>\n\nUSER: Well\n\nASSISTANT: Good. <|endoftext|>",
        }
    )
    assert example.messages[0] == {"role": "system", "content": "You are a helpful assistant, with no access to external functions."}
    assert [message["content"] for message in example.messages[1:]] == ["Hi", "Hello.\n\nHow are you?", "Well", "Good."]


@pytest.mark.parametrize(
    ("text", "arguments", "repaired"),
    [
        ("""<functioncall> {"name": "find", "arguments": {"a": 1}}""", {"a": 1}, ["arguments without their quotes"]),
        ("""<functioncall> {"name": "find", "arguments": '{"a": "it's"}'}""", {"a": "it's"}, []),
        ("""<functioncall> {"name": "find", "arguments": '{"a": "{'b': 'c'}"}'}""", {"a": "{'b': 'c'}"}, []),
        (r"""<functioncall> {"name": "find", "arguments": '{"a": "it\'s"}'}""", {"a": "it's"}, ["escaped apostrophe"]),
        ("""<functioncall> {"name": "find", "arguments": null}""", {}, ["arguments are null", "arguments without their quotes"]),
        ("""<functioncall> {"name": "find", "parameters": '{"a": 1}'}""", {"a": 1}, ['"parameters" for "arguments"']),
        ("""<functioncall> {"name": "find", "arguments": '{"a": 1}}'}""", {"a": 1}, ["brace too many"]),
        ("""<functioncall> {"name": "find", "arguments": '{"a": 1}'}}""", {"a": 1}, ["brace too many"]),
        ("""I will look. <functioncall> {"name": "find", "arguments": '{"a": 1}'}""", {"a": 1}, ["text before a call"]),
        ("""<functioncall> {"name": "find"}""", {}, []),
        ("""<functioncall> {"name": "find", "arguments": '{"a": "line\nbreak"}'}""", {"a": "line\nbreak"}, []),
        (r"""<functioncall> {"name": "find", "arguments": "{\"a\": 1}"}""", {"a": 1}, ["arguments without their quotes"]),
        ("""<functioncall> {"name": "find", "arguments": '{"a": "<|endoftext|>"}'}""", {"a": ""}, ["stray <|endoftext|>"]),
    ],
)
def test_odd_call_is_read_and_what_was_mended_is_named(text, arguments, repaired):
    assert call_of(text) == (arguments, repaired)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("""<functioncall> {"name": "find", "arguments": '{"a": 1""", "truncated call"),
        ("""<functioncall> {"name": "find", "arguments": {"a": "x""", "truncated call"),
        ("""<functioncall> {"name": "find", "arguments": '{"a": 1}'""", "truncated call"),
        ("""<functioncall> {"name": "find", "arguments": '{a: 1, b: 2, c: 3}'}""", "arguments are not JSON"),
        ("""<functioncall> {"name": "find", "arguments": '[1, 2]'}""", "call arguments are not an object"),
        ("""<functioncall> {"name": "find", "arguments": '{"a": Infinity}'}""", "arguments hold a number that JSON lacks"),
        ("""<functioncall> find(a=1)""", "call in an unknown syntax"),
        ("""{"function_call": {"name": "find"}}""", "call in an unknown syntax"),
        ("""<functioncall> {"name": "find", "arguments": '{}'} That is all.""", "text after a call"),
        ("""<functioncall> {"name": "search", "arguments": '{}'}""", "call of an undeclared function"),
    ],
)
def test_call_that_cannot_be_read_has_a_reason(text, expected):
    assert reason(row(text)) == expected


def test_function_declared_twice_is_kept_once_and_named():
    example = convert({"system": system("find", "find", "other"), "chat": "USER: Hi\n\n\nASSISTANT: Hello. <|endoftext|>"})
    assert [tool["function"]["name"] for tool in example.tools] == ["find", "other"]
    assert example.meta["repaired"] == ["function declared twice"]


def test_stray_end_of_text_is_removed_and_named():
    example = convert({"system": WITHOUT, "chat": "USER: Hi <|endoftext|> there\n\nASSISTANT: One <|endoftext|> two <|endoftext|>"})
    assert [message["content"] for message in example.messages[1:]] == ["Hi  there", "One  two"]
    assert example.meta["repaired"] == ["stray <|endoftext|>"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"system": system("find")[:-20], "chat": "USER: Hi\n\n\nASSISTANT: Hello."}, "declaration is not JSON"),
        ({"system": WITHOUT, "chat": "ASSISTANT: Hello."}, "first turn is not the user's"),
        ({"system": WITHOUT, "chat": "USER: Hello."}, "no assistant turn"),
        ({"system": WITHOUT, "chat": "USER: Hi\n\nASSISTANT: <|endoftext|>"}, "empty assistant turn"),
        ({"system": WITHOUT, "chat": "USER: Hi\n\nASSISTANT: Yes.\n\nFUNCTION RESPONSE: {}"}, "function response without a call"),
        ({"system": WITHOUT, "chat": "Hello. USER: Hi"}, "text before the first turn"),
        ({"system": None, "chat": "USER: Hi"}, "no system or chat text"),
    ],
)
def test_conversation_that_cannot_be_used_has_a_reason(raw, expected):
    assert reason(raw) == expected
