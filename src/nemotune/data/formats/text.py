"""Plain text, for pretraining: text str. Also `content`, as some corpora name it."""

from __future__ import annotations

from typing import Any

from nemotune.data.example import Example, RowError


def convert(row: dict[str, Any]) -> Example:
    """The text as it stands, whitespace included: a completion without a prompt, so that every token of it is trained on."""
    text = row.get("text", row.get("content"))
    if not isinstance(text, str):
        raise RowError("no text", f"the row has {', '.join(row) or 'no keys'}")
    if not text.strip():
        raise RowError("empty text")
    return Example(completion=text)
