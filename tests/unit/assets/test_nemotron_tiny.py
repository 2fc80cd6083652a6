"""What the built-in model promises: its size and shape, its tokens, its template, and rows that training has not seen."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from nemotune import assets
from nemotune.models import load_tokenizer, read_config
from nemotune.weights import Checkpoint

TINY = assets.resolve("nemotron-tiny")
CALL = {"type": "function", "function": {"name": "book_taxi", "arguments": {"city": "Lake Dorford", "people": 3}}}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "A taxi in Lake Dorford for 3."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "done"},
    {"role": "assistant", "content": "It is booked.", "reasoning_content": "The tool says done."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("nemotron-tiny")


def read_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (TINY / name).read_text(encoding="utf-8").splitlines()]


def test_weights_are_small_bfloat16_and_of_every_block_type():
    assert set(read_config(TINY).block_types) == {"mamba", "attention", "mlp", "moe"}
    assert (TINY / "model.safetensors").stat().st_size < 16e6
    assert Counter(info.dtype for info in Checkpoint(TINY).tensors.values()).most_common(1)[0][0] == "BF16"


def test_rows_of_large_matrices_suit_k_quants():
    config = read_config(TINY)
    assert config.vocab_size % 8 == 0 and config.n_routed_experts != 8
    widths = (
        config.hidden_size,
        config.mamba_inner_size,
        config.intermediate_size,
        config.moe_intermediate_size,
        config.moe_shared_expert_intermediate_size,
    )
    assert all(width % 256 == 0 for width in widths)


def test_first_tokens_are_those_of_nemotron_3(tokenizer):
    shared = os.environ.get("NEMOTUNE_TEST_DATA")
    if shared is None:
        pytest.skip("NEMOTUNE_TEST_DATA is not set")
    theirs = json.loads(gzip.decompress((Path(shared) / "data/nemotron/tokenizer/nemotron3_tokenizer.RECONSTRUCTED.json.gz").read_bytes()))
    ours = json.loads((TINY / "tokenizer.json").read_text())
    assert ours["added_tokens"][:32] == theirs["added_tokens"][:32]
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"]


def test_chat_ends_at_im_end_and_text_at_eos(tokenizer):
    generation = json.loads((TINY / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert len(tokenizer) == read_config(TINY).vocab_size


@pytest.mark.parametrize("turn", [2, 4])
def test_generation_prompt_begins_the_rendered_turn(tokenizer, turn):
    thinking = "reasoning_content" in CONVERSATION[turn]
    prompt = tokenizer.apply_chat_template(CONVERSATION[:turn], tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    whole = tokenizer.apply_chat_template(CONVERSATION[: turn + 1], tokenize=False)
    assert whole.startswith(prompt)


def test_assistant_turns_read_as_in_nemotron_3(tokenizer):
    shared = os.environ.get("NEMOTUNE_TEST_DATA")
    if shared is None:
        pytest.skip("NEMOTUNE_TEST_DATA is not set")
    theirs = (Path(shared) / "data/nemotron/chat_templates/nemotron_3_nano.jinja").read_text()
    assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == tokenizer.apply_chat_template(
        CONVERSATION, tokenize=False, chat_template=theirs
    )


def test_declared_functions_stand_in_the_system_turn(tokenizer):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}, "people": {"type": "integer"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "book_taxi", "description": "Book a taxi", "parameters": parameters}}
    text = tokenizer.apply_chat_template(CONVERSATION[:2], tools=[tool], tokenize=False)
    declared = (
        "<tools>\n<function=book_taxi>\nBook a taxi\n<parameter=city> string\n<parameter=people> integer, optional\n</function>\n</tools>"
    )
    assert text.startswith(f"<|im_start|>system\nBe brief.\n{declared}<|im_end|>\n")


def called(row: dict) -> list[dict]:
    return [call["function"] for message in row["messages"] for call in message.get("tool_calls", ())]


def test_held_out_functions_are_declared_in_no_training_row():
    trained = {tool["function"]["name"] for row in read_rows("train.jsonl") for tool in row["tools"]}
    new = {function["name"] for row in read_rows("test/tools.jsonl") for function in called(row)}
    known = {function["name"] for row in read_rows("test/arguments.jsonl") for function in called(row)}
    assert len(new) >= 5 and not new & trained
    assert len(known & trained) > 0.9 * len(known)


@pytest.mark.parametrize("name", ["test/arguments.jsonl", "test/tools.jsonl"])
def test_every_test_row_asks_for_something_that_no_training_row_holds(name):
    """Its question stands in none, and each of its calls has a value that no training row's call has."""
    trained = [function for row in read_rows("train.jsonl") for function in called(row)]
    questions = {message["content"] for row in read_rows("train.jsonl") for message in row["messages"] if message["role"] == "user"}
    values = {str(value) for function in trained for value in function["arguments"].values()}
    rows = read_rows(name)
    assert not questions & {message["content"] for row in rows for message in row["messages"] if message["role"] == "user"}
    assert [f for row in rows for f in called(row) if values.issuperset(map(str, f["arguments"].values()))] == []


def open_values(name: str) -> set[str]:
    """Names, places and titles of the calls; days and rooms come from lists of seven and eight that both sides share."""
    closed = {"day", "weekday", "room", "location"}
    arguments = (function["arguments"] for row in read_rows(name) for function in called(row))
    return {value for each in arguments for key, value in each.items() if isinstance(value, str) and key not in closed}


@pytest.mark.parametrize("name", ["test/arguments.jsonl", "test/tools.jsonl"])
def test_names_places_and_titles_of_test_rows_stand_in_no_training_row(name):
    held_out, trained = open_values(name), open_values("train.jsonl")
    assert len(held_out) > 10 and not held_out & trained
    questions = "\n".join(row["messages"][0]["content"] for row in read_rows("train.jsonl"))
    assert not [value for value in held_out if f" {value}" in questions]
