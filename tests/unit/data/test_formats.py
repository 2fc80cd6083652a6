"""Rows as they are published, and with the holes that real ones have."""

from __future__ import annotations

import pytest

from nemotune.data.example import Example, RowError
from nemotune.data.formats import FORMATS

MEDMCQA = {
    "question": "Which vitamin? ", "opa": "A1", "opb": "B12", "opc": "C", "opd": "D3", "cop": 1, "exp": None, "subject_name": "Medicine", "topic_name": None,
}  # fmt: skip
SQUAD = {
    "id": "q1",
    "context": "It rained in Oslo.",
    "question": "Where?",
    "answers": {"text": ["Oslo", "in Oslo", "Oslo"], "answer_start": [13, 10, 13]},
}


def reason(name, row):
    with pytest.raises(RowError) as error:
        FORMATS[name](row)
    return error.value.reason


def test_medmcqa_prompt_ends_at_answer_and_the_space_belongs_to_the_completion():
    example = FORMATS["medmcqa"](MEDMCQA)
    assert example.prompt == "Question: Which vitamin?\nA. A1\nB. B12\nC. C\nD. D3\nAnswer:"
    assert example.completion == " B"
    assert example.messages[-1] == {"role": "assistant", "content": "B"}
    assert example.meta == {"answer": "B", "options": ["A1", "B12", "C", "D3"], "subject": "Medicine"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"cop": -1}, "no label"),
        ({"cop": None}, "no label"),
        ({"cop": 4}, "cop out of range"),
        ({"cop": True}, "cop out of range"),
        ({"cop": "x"}, "cop out of range"),
        ({"cop": 0.5}, "cop out of range"),
        ({"opc": None}, "option missing"),
        ({"opd": "  "}, "option missing"),
        ({"question": ""}, "no question"),
    ],
)
def test_medmcqa_row_that_cannot_be_used_has_a_reason(change, expected):
    assert reason("medmcqa", MEDMCQA | change) == expected


@pytest.mark.parametrize("cop", ["3", 3.0])
def test_medmcqa_answer_survives_csv_and_nullable_columns(cop):
    assert FORMATS["medmcqa"](MEDMCQA | {"cop": cop}).meta["answer"] == "D"


def test_fiqa_prompt_is_the_published_one():
    example = FORMATS["fiqa"]({"question": "Is gold safe?", "ground_truths": ["Rarely.", "No."]})
    assert example.prompt + example.completion == (
        "You are a helpful financial assistant. Provide comprehensive, detailed answers to financial questions. "
        "Include relevant context, examples, and explanations when appropriate.\n\nQuestion: Is gold safe?\n\nAnswer: Rarely."
    )
    assert FORMATS["fiqa"]({"question": "Is gold safe?", "answer": "Rarely."}) == example


@pytest.mark.parametrize("truths", [[], [""], [None], "a string"])
def test_fiqa_without_an_answer_is_rejected(truths):
    assert reason("fiqa", {"question": "Why?", "ground_truths": truths}) == "no answer"


def test_squad_trains_on_the_first_answer_and_keeps_all():
    example = FORMATS["squad"](SQUAD)
    assert (example.prompt, example.completion) == ("Context: It rained in Oslo. Question: Where? Answer:", " Oslo")
    assert example.meta == {"answers": ["Oslo", "in Oslo"], "id": "q1"}
    assert reason("squad", SQUAD | {"answers": {"text": [], "answer_start": []}}) == "no answer"


def test_text_keeps_its_white_space():
    assert FORMATS["text"]({"text": " a\n\nb "}) == Example(completion=" a\n\nb ")
    assert reason("text", {"text": " \n"}) == "empty text"
    assert reason("text", {"body": "x"}) == "no text"


def test_chat_spells_every_dialect_alike():
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    openai = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": "Go"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            {"role": "function", "name": "f", "content": "2"},
            {"role": "assistant", "content": "Two."},
        ],
        "tools": '[{"name": "f", "parameters": {}}]',
    }
    sharegpt = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Go"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two."},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    }
    example = FORMATS["chat"](openai)
    assert [message["role"] for message in example.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert example.messages[2] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert FORMATS["chat"](sharegpt) == example


def test_chat_keeps_reasoning_weight_and_group():
    row = {"messages": [{"role": "assistant", "content": "4", "reasoning_content": "2+2", "weight": 0}], "group": "sums"}
    example = FORMATS["chat"](row)
    assert example.messages[0] == {"role": "assistant", "content": "4", "reasoning_content": "2+2", "weight": 0}
    assert example.meta == {"group": "sums"}


def test_chat_prompt_and_completion_keep_the_raw_boundary():
    example = FORMATS["chat"]({"prompt": "2 + 2 = ", "completion": "4"})
    assert (example.prompt, example.completion) == ("2 + 2 =", " 4")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "Hi"}], "no assistant turn"),
        ([{"role": "assistant", "content": ""}], "empty assistant turn"),
        ([{"role": "narrator", "content": "Hi"}], "unknown role"),
        ([{"content": "Hi"}], "message without a role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content is not text"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "call arguments are not JSON"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}], "call arguments are not an object"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "call without a name"),
    ],
)
def test_chat_row_that_cannot_be_used_has_a_reason(messages, expected):
    assert reason("chat", {"messages": messages}) == expected


def test_example_survives_json():
    example = FORMATS["medmcqa"](MEDMCQA)
    assert Example.from_json(example.to_json()) == example


def test_answered_replaces_the_answer_in_both_forms():
    other = FORMATS["medmcqa"](MEDMCQA).answered("D")
    assert (other.completion, other.messages[-1]["content"]) == (" D", "D")
    assert other.prompt == FORMATS["medmcqa"](MEDMCQA).prompt


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"messages": '[{"role": "user"}]'}, "'messages' is text, expected a list, which a .csv cannot hold: use JSON lines"),
        ({"conversations": {}}, "'conversations' is dict, expected a list"),
        ({"messages": None, "text": "x"}, "the row has messages, text"),
        ({}, "the row has no keys"),
    ],
)
def test_chat_without_a_list_of_messages_says_what_is_there(row, detail):
    with pytest.raises(RowError) as error:
        FORMATS["chat"](row)
    assert (error.value.reason, error.value.detail) == ("no messages", detail)
