"""The small tokenizer, rows on disk, and a recipe around them."""

from __future__ import annotations

import json

import pytest
from toy_chat import PLAIN, toy_tokenizer

from nemotune.recipe.schema import Recipe


@pytest.fixture(scope="session")
def bare_tokenizer():
    """Without a chat template."""
    return toy_tokenizer()


@pytest.fixture
def tokenizer(bare_tokenizer):
    """The small tokenizer with the small template."""
    bare_tokenizer.chat_template = PLAIN
    yield bare_tokenizer
    bare_tokenizer.chat_template = None


@pytest.fixture
def write_rows(tmp_path):
    """Write rows as JSON lines, return the path."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def make_recipe():
    """A recipe around `data` settings."""

    def make(seed=42, **data):
        return Recipe.model_validate({"name": "test", "model": {"path": "unused"}, "data": data, "train": {"seed": seed}})

    return make
