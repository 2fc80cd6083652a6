"""Rows of explodinggradients/fiqa (config main): financial questions with free answers.

question str; ground_truths list[str], of which the first is used; or answer str in copies that hold a single one.
"""

from __future__ import annotations

from typing import Any

from nemotune.data.example import Example, RowError, conversation, text_of

SYSTEM = (
    "You are a helpful financial assistant. Provide comprehensive, detailed answers to financial questions. "
    "Include relevant context, examples, and explanations when appropriate."
)


def convert(row: dict[str, Any]) -> Example:
    """Raw: the system sentence, `Question: ...`, `Answer:`, parted by blank lines, then ` ...`. Chat: system, user, assistant."""
    question = text_of(row, "question", reason="no question")
    answer = _answer(row)
    return Example(
        messages=conversation(("system", SYSTEM), ("user", question), ("assistant", answer)),
        prompt=f"{SYSTEM}\n\nQuestion: {question}\n\nAnswer:",
        completion=f" {answer}",
        meta={"answer": answer},
    )


def _answer(row: dict[str, Any]) -> str:
    truths = row.get("ground_truths")
    if truths is None:
        return text_of(row, "answer", reason="no answer")
    if not isinstance(truths, list) or not truths or not isinstance(truths[0], str) or not truths[0].strip():
        raise RowError("no answer", f"ground_truths is {str(truths)[:60]!r}")
    return truths[0].strip()
