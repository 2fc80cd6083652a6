"""Rows of rajpurkar/squad: a question about a paragraph, answered by a span of it.

id str; title str; context str; question str; answers {"text": list[str], "answer_start": list[int]}. All answers are kept for
scoring, the first is trained on; a question without any (SQuAD 2) is not usable, since there is no span to learn.
"""

from __future__ import annotations

from typing import Any

from nemotune.data.example import Example, RowError, conversation, text_of


def convert(row: dict[str, Any]) -> Example:
    """Raw, as Megatron-Bridge has it: `Context: ... Question: ... Answer:`, then ` ...`. Chat: both in the user's turn."""
    context = text_of(row, "context", reason="no context")
    question = text_of(row, "question", reason="no question")
    answers = _answers(row.get("answers"))
    asked = f"Context: {context}\n\nQuestion: {question}\n\nAnswer with a span of the context."
    return Example(
        messages=conversation(("user", asked), ("assistant", answers[0])),
        prompt=f"Context: {context} Question: {question} Answer:",
        completion=f" {answers[0]}",
        meta={"answers": answers, "id": row.get("id")},
    )


def _answers(value: Any) -> list[str]:
    texts = value.get("text") if isinstance(value, dict) else [answer.get("text") for answer in value or () if isinstance(answer, dict)]
    if isinstance(texts, str):
        texts = [texts]
    answers = list(dict.fromkeys(text.strip() for text in texts or () if isinstance(text, str) and text.strip()))
    if not answers:
        raise RowError("no answer", f"answers is {str(value)[:60]!r}")
    return answers
