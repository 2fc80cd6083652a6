"""What of a tokenizer is in a GGUF file, and which tokenizers are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGUFWriter, TokenType
from toy_chat import toy_tokenizer
from toy_gguf import SIDE_FILES, TINY, edit_json

from nemotune.errors import CheckpointError, DataError, UnsupportedError
from nemotune.export.gguf.tokenizer import add_tokenizer, stop_tokens


@pytest.fixture
def tiny(tmp_path) -> Path:
    """The tokenizer of nemotron-tiny, which is Nemotron-3's in small."""
    for name in (*SIDE_FILES, "config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    return tmp_path


def keys(directory: Path, *, vocab_size: int = 1504, template: str | None = None) -> dict:
    writer = GGUFWriter(None, "llama")
    add_tokenizer(writer, directory, vocab_size, template=template, stops=stop_tokens(None, directory))
    return {name.removeprefix("tokenizer.").removeprefix("ggml."): value.value for name, value in writer.kv_data[0].items()}


def test_special_tokens_are_hidden_and_marks_of_tools_and_thinking_are_kept(tiny):
    found = keys(tiny)
    kinds = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert {kinds[text] for text in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")} == {TokenType.CONTROL}
    assert {kinds[text] for text in ("<think>", "</think>", "<tool_call>", "</tool_call>")} == {TokenType.USER_DEFINED}
    assert kinds["a"] == TokenType.NORMAL and len(found["merges"]) == 1216 and found["pre"] == "tekken"


def test_ends_are_those_of_tokenizer_generation_and_config(tiny):
    found = keys(tiny)
    assert (found["eos_token_id"], found["eot_token_id"], "eom_token_id" in found) == (11, 11, False)
    assert stop_tokens(None, tiny) == (2, 11)
    edit_json(tiny / "generation_config.json", eos_token_id=[2, 11, 7])
    assert keys(tiny)["eom_token_id"] == 7  # llama.cpp does not know it by its text
    edit_json(tiny / "generation_config.json", eos_token_id=[2, 11, 5, 6])
    with pytest.raises(UnsupportedError, match=r"eos_token_id: got \[2, 5, 6, 11\]"):
        keys(tiny)


def test_ends_of_the_adapter_win_over_the_bases(tiny, tmp_path_factory):
    adapter = tmp_path_factory.mktemp("adapter")
    assert stop_tokens(adapter, tiny) == (2, 11)
    (adapter / "generation_config.json").write_text('{"eos_token_id": 10}')
    assert stop_tokens(adapter, tiny) == (10, 2)


def test_ends_that_are_no_tokens_are_named(tiny):
    edit_json(tiny / "generation_config.json", eos_token_id=[2, 1504])
    with pytest.raises(CheckpointError, match="eos_token_id: got 1504, expected a token of 0 to 1503"):
        keys(tiny)
    for wrong in ("x", [[2]], 2.0):
        edit_json(tiny / "generation_config.json", eos_token_id=wrong)
        with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id: got .*expected the numbers of tokens"):
            stop_tokens(None, tiny)
    (tiny / "generation_config.json").write_text("{")
    with pytest.raises(DataError, match="generation_config.json: cut off"):
        stop_tokens(None, tiny)


def test_nothing_is_put_before_a_text_unless_the_tokenizer_does(tiny):
    """llama.cpp's own default for this way to split is to add <s>."""
    assert keys(tiny)["add_bos_token"] is False
    bos, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    named = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    puts_bos = {"type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text], "special_tokens": named}
    edit_json(tiny / "tokenizer.json", post_processor=puts_bos)
    assert keys(tiny)["add_bos_token"] is True


def test_the_template_that_was_trained_with_wins(tiny):
    assert keys(tiny)["chat_template"] == (TINY / "chat_template.jinja").read_text()
    assert keys(tiny, template="{{ mine }}")["chat_template"] == "{{ mine }}"


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tiny):
    toy_tokenizer().backend_tokenizer.save(str(tiny / "tokenizer.json"))
    with pytest.raises(UnsupportedError, match="pre_tokenizer: llama.cpp knows no tokenizer that splits texts like this one"):
        keys(tiny)


@pytest.mark.parametrize("change", [{"normalizer": {"type": "Lowercase"}}, {"model": "WordLevel"}, {"ignore_merges": False}])
def test_a_tokenizer_that_changes_texts_otherwise_is_refused(change, tiny):
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    if "normalizer" in change:
        tokenizer |= change
    else:
        tokenizer["model"] |= {"type": "WordLevel"} if "model" in change else change
    (tiny / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedError, match="llama.cpp knows no tokenizer"):
        keys(tiny)


@pytest.mark.parametrize("change", [{"pre_tokenizer": 5}, {"model": 5}, {"pre_tokenizer": {"pretokenizers": [{"type": "Split"}]}}])
def test_a_tokenizer_of_another_shape_is_refused(change, tiny):
    edit_json(tiny / "tokenizer.json", **change)
    with pytest.raises(UnsupportedError, match="knows no tokenizer"):
        keys(tiny)


def test_more_tokens_than_rows_are_refused(tiny):
    with pytest.raises(CheckpointError, match="has the token 1503, but the embeddings have 1500 rows"):
        keys(tiny, vocab_size=1500)
