"""The generators of nemotron-tiny: the same seeds give the shipped files, and the base's texts hold no call."""

from __future__ import annotations

import random
import sys
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

from scripts.make_tiny import chats, corpus, model, tokenizer  # noqa: E402
from scripts.make_tiny.__main__ import write_rows  # noqa: E402
from scripts.make_tiny.rendering import MODEL_DIR  # noqa: E402
from scripts.make_tiny.tools import HELD_OUT_TOOLS  # noqa: E402


def test_rows_are_made_again_byte_for_byte(tmp_path):
    write_rows(tmp_path)
    for name in ("train.jsonl", "test/arguments.jsonl", "test/tools.jsonl"):
        assert (tmp_path / name).read_bytes() == (MODEL_DIR / name).read_bytes()


def test_configs_are_made_again_byte_for_byte(tmp_path):
    model.write_configs(tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (MODEL_DIR / name).read_bytes()


def test_a_tokenizer_is_a_function_of_its_texts():
    texts = list(islice(corpus.documents(random.Random(0)), 300))
    assert tokenizer.train(texts).to_str() == tokenizer.train(texts).to_str()


@pytest.fixture(scope="module")
def pages() -> str:
    return "\n".join(islice(corpus.pages(random.Random(0)), 3000))


def test_pretraining_text_holds_no_call(pages):
    assert "<tool_call>\n<function=" not in pages


def test_pretraining_text_names_no_held_out_function(pages):
    assert not [tool.name for tool in HELD_OUT_TOOLS if tool.name in pages]


def test_conversations_of_the_second_stage_call_nothing_and_name_no_held_out_function():
    rows = list(islice(chats.rows(random.Random(0)), 3000))
    assert not any(message.get("tool_calls") for row in rows for message in row["messages"])
    declared = {tool["function"]["name"] for row in rows for tool in row.get("tools", ())}
    assert len(declared) > 200 and not declared & {tool.name for tool in HELD_OUT_TOOLS}


def test_a_name_is_one_token_wherever_it_stands():
    trained = tokenizer.train(["Anna said: book_Anna Anna\nAnna"] * 50)
    assert all(trained.encode(text).tokens[-1] == "Anna" for text in ("Anna", " Anna", "=Anna", "_Anna", "\nAnna"))
