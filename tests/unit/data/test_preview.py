"""What a person sees: counts, reasons, lengths, and exactly the trained tokens marked."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from nemotune.data.prepare import prepare
from nemotune.data.preview import show, tokens_shown


@pytest.fixture
def prepared(tokenizer, make_recipe, write_rows, tmp_path):
    turns = [{"messages": [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": f"Hi {i}."}]} for i in range(20)]
    held = write_rows(turns[:2], "held.jsonl")
    recipe = make_recipe(format="chat", train=write_rows([*turns, {"text": "x"}]), validation=held, sequence_length=128)
    return prepare(recipe, tokenizer, out_dir=tmp_path / "data", cache_dir=tmp_path / "cache")


def printed(prepared, tokenizer, **settings):
    console = Console(file=io.StringIO(), width=120, **settings)
    show(prepared, tokenizer, console, samples=1)
    return console.file.getvalue()


def test_plain_preview_marks_the_trained_tokens(prepared, tokenizer):
    text = printed(prepared, tokenizer)
    assert "<|im_start|>assistant⏎" in text
    assert "<think></think>⟦Hi 0.<|im_end|>⟧" in text
    assert "data.train: 21 rows read, 1 bad" in text
    assert "1 x no messages: row 20" in text
    assert "2 validation rows are trained on as well" in text
    assert "template: the tokenizer's own" in text
    assert "up to        32 " in text


def test_rows_that_are_validated_and_tested_on_are_told(prepared, tokenizer):
    assert "are validated on as well" not in printed(prepared, tokenizer)
    prepared.stats["in_validation_too"] = 3
    assert "3 test rows are validated on as well, word for word: the best weights were chosen by them" in printed(prepared, tokenizer)


def test_counts_of_a_split_are_whole_on_80_columns(prepared, tokenizer):
    stats = prepared.stats["splits"]
    stats["validation"] |= dict.fromkeys(("rows", "documents", "packs", "truncated", "dropped"), 123_456) | {"tokens": 123_456_789}
    console = Console(file=io.StringIO(), width=80)
    show(prepared, tokenizer, console, samples=0)
    lines = console.file.getvalue().splitlines()
    assert lines[1].split() == ["split", "rows", "docs", "packs", "tokens", "trained", "filled", "cut", "dropped"]
    assert len(lines[3].split()) == 9 and lines[3].split()[1:5] == ["123,456", "123,456", "123,456", "123,456,789"]
    assert "…" not in "".join(lines[:4])


def test_name_of_a_template_is_no_markup(prepared, tokenizer):
    prepared.stats["template"] = "mine[/1].jinja"
    assert "template: mine[/1].jinja" in printed(prepared, tokenizer)


def test_coloured_preview_highlights_the_same_tokens(prepared, tokenizer):
    shown = tokens_shown(prepared.train[0], tokenizer)
    green = "".join(shown.plain[span.start : span.end] for span in shown.spans if "green" in str(span.style))
    assert green == "Hi 0.<|im_end|>"
    assert "\x1b[" in printed(prepared, tokenizer, force_terminal=True, color_system="standard")


def test_long_documents_are_shown_around_their_first_trained_token(prepared, tokenizer, monkeypatch):
    monkeypatch.setattr("nemotune.data.preview.BEFORE", 2)
    monkeypatch.setattr("nemotune.data.preview.AFTER", 1)
    document = prepared.train[0]
    first = document.mask.tolist().index(True)
    shown = tokens_shown(document, tokenizer, plain=True).plain
    assert shown == f"... {first - 2} tokens ... <think></think>⟦H⟧ ... {len(document.tokens) - first - 1} tokens ..."
