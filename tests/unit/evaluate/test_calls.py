"""Tool calls are read in each syntax that models write, and compared in the types that their tools declare."""

from __future__ import annotations

import pytest

from nemotune.evaluate.calls import Call, parse_reply, typed
from nemotune.evaluate.tool_calls import scores

WEATHER = Call("get_weather", {"city": "Oslo", "days": 3})
SAME_CALL = {
    "nemotron": "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n",
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>',
    "nano_v1": '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}]</TOOLCALL>',
    "glaive": """<functioncall> {"name": "get_weather", "arguments": '{"city": "Oslo", "days": 3}'}""",
    "glaive_object": '<functioncall> {"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}',
    "llama": '{"name": "get_weather", "parameters": {"city": "Oslo", "days": 3}}',
    "llama_tag": '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Oslo", "days": "3"}}',
    "openai": '<tool_call>{"type": "function", "function": {"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\", \\"days\\": 3}"}}</tool_call>',
    "after_words": 'Let me look.\n<tool_call>{"name": "get_weather", "arguments": {"days": 3.0, "city": "Oslo"}}</tool_call>',
    "after_a_thought": '<think>\nI could <tool_call> here\n</think>\n<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}</tool_call>',
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"}, "days": {"type": "integer"}, "metric": {"type": "boolean"},
                    "at": {"type": ["number", "null"]}, "tags": {"type": "array"}, "note": {"type": ["string", "null"]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]  # fmt: skip


@pytest.mark.parametrize("syntax", SAME_CALL)
def test_every_syntax_gives_the_same_call(syntax):
    reply = parse_reply(SAME_CALL[syntax])
    assert reply.attempted
    assert [typed(call, TOOLS) for call in reply.calls] == [WEATHER]


TWO = [Call("now", {}), WEATHER]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=now>\n</function>\n</tool_call>\n" + SAME_CALL["nemotron"],
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>\n' + SAME_CALL["hermes"],
        """<functioncall> {"name": "now", "arguments": '{}'}\n""" + SAME_CALL["glaive"],
        '{"name": "now", "parameters": {}}; ' + SAME_CALL["llama"],
        '[{"name": "now"}, {"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}]',
    ],
)
def test_several_calls_are_all_read(text):
    assert [typed(call, TOOLS) for call in parse_reply(text).calls] == TWO
    assert scores(text, calls=[WEATHER, Call("now", {})], tools=TOOLS)["exact"] == 1.0


@pytest.mark.parametrize(
    "text", ["The weather is fine.", "", '{"city": "Oslo"}', "In JSON, {} is empty.", "<think>\n<tool_call>\n</think>\nNo."]
)
def test_words_are_no_attempt(text):
    reply = parse_reply(text)
    assert not reply.attempted and not reply.calls


@pytest.mark.parametrize(
    "text",
    [
        SAME_CALL["nemotron"].replace("</tool_call>", ""),
        SAME_CALL["nemotron"].replace("<parameter=days>", ""),
        SAME_CALL["nemotron"].replace("<function=get_weather>", "get_weather"),
        SAME_CALL["hermes"].replace("}}", "}"),
        SAME_CALL["hermes"].replace('"name"', '"called"'),
        SAME_CALL["glaive"].replace("'}", ""),
        '{"name": "get_weather", "parameters": ["Oslo"]}',
        '{"name": "get_weather", "parameters": ' + "[" * 100_000,
        "<tool_call></tool_call><functioncall>",
    ],
)
def test_what_cannot_be_read_is_an_attempt_without_calls(text):
    reply = parse_reply(text)
    assert reply.attempted and not reply.calls
    assert scores(text, calls=[WEATHER], tools=TOOLS) == {
        "call_decision": 1.0,
        "valid_call": 0.0,
        "name": 0.0,
        "arguments": 0.0,
        "exact": 0.0,
    }


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"city": "5"}, {"city": "5"}),  # a declared string stays text
        ({"city": 5}, {"city": "5"}),
        ({"days": "5"}, {"days": 5}),
        ({"days": 5.0}, {"days": 5}),
        ({"metric": "True"}, {"metric": True}),
        ({"metric": "false"}, {"metric": False}),
        ({"at": "None"}, {"at": None}),
        ({"at": "1e3"}, {"at": 1000}),
        ({"tags": '["a", 1.0]'}, {"tags": ["a", 1]}),
        ({"note": "None"}, {"note": None}),
        ({"unknown": "[1]"}, {"unknown": [1]}),
        ({"unknown": "free text"}, {"unknown": "free text"}),
    ],
)
def test_arguments_are_compared_in_their_declared_type(written, meant):
    assert typed(Call("get_weather", written), TOOLS) == typed(Call("get_weather", meant), TOOLS)


def test_true_is_not_one():
    got = scores('{"name": "get_weather", "parameters": {"metric": 1}}', calls=[Call("get_weather", {"metric": True})], tools=TOOLS)
    assert (got["name"], got["arguments"], got["exact"]) == (1.0, 0.0, 0.0)


def test_a_value_keeps_its_inner_line_breaks():
    text = "<tool_call>\n<function=get_weather>\n<parameter=city>\n two\n\nlines \n</parameter>\n</function>\n</tool_call>"
    assert parse_reply(text).calls == (Call("get_weather", {"city": " two\n\nlines "}),)


def test_scores_part_name_and_arguments():
    other_name = scores(SAME_CALL["hermes"].replace("get_weather", "forecast"), calls=[WEATHER], tools=TOOLS)
    assert (other_name["valid_call"], other_name["name"], other_name["arguments"], other_name["exact"]) == (1.0, 0.0, 1.0, 0.0)
    other_city = scores(SAME_CALL["nemotron"].replace("Oslo", "Rome"), calls=[WEATHER], tools=TOOLS)
    assert (other_city["valid_call"], other_city["name"], other_city["arguments"], other_city["exact"]) == (1.0, 1.0, 0.0, 0.0)
    missing = scores(SAME_CALL["hermes"], calls=[WEATHER, WEATHER], tools=TOOLS)
    assert (missing["name"], missing["exact"]) == (0.0, 0.0)


def test_a_turn_in_words_is_scored_on_the_decision_alone():
    assert scores("No function fits.", calls=[], tools=TOOLS) == {"call_decision": 1.0}
    assert scores(SAME_CALL["glaive"], calls=[], tools=TOOLS) == {"call_decision": 0.0}


@pytest.mark.parametrize(
    "declaration", [{"name": "f"}, {"name": "f", "parameters": None}, {"name": "f", "parameters": {"properties": None}}]
)
def test_loose_declarations_do_not_matter(declaration):
    call = Call("f", {"x": "1"})
    assert typed(call, [{"type": "function", "function": declaration}]) == Call("f", {"x": 1})
