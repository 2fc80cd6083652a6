"""Rows of openlifescienceai/medmcqa: a medical question with four options.

question str; opa, opb, opc, opd str; cop int, 0-based answer (-1 in the test split, which has no labels); exp str | null, the
explanation; subject_name str; topic_name str | null; choice_type "single" | "multi" (one option is right in both); id str.
"""

from __future__ import annotations

from typing import Any

from nemotune.data.example import Example, RowError, conversation, text_of

LETTERS = "ABCD"


def convert(row: dict[str, Any]) -> Example:
    """Raw: the question, its options and `Answer:`, then ` B`. Chat: the same with a request for the letter, then `B`."""
    question = text_of(row, "question", reason="no question")
    options = [text_of(row, f"op{letter.lower()}", reason="option missing") for letter in LETTERS]
    answer = LETTERS[_answer(row.get("cop"))]
    asked = "\n".join([f"Question: {question}", *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))])
    meta = {"answer": answer, "options": options, "subject": row.get("subject_name")}
    if isinstance(row.get("exp"), str):
        meta["explanation"] = row["exp"]
    return Example(
        messages=conversation(("user", f"{asked}\nAnswer with the letter of the correct option."), ("assistant", answer)),
        prompt=f"{asked}\nAnswer:",
        completion=f" {answer}",
        meta=meta,
    )


def _answer(cop: Any) -> int:
    if isinstance(cop, str) and cop.strip().lstrip("-").isdigit():  # CSV has only text
        cop = int(cop)
    if cop is None or cop == -1:
        raise RowError("no label", f"cop is {cop}")
    if isinstance(cop, float) and cop.is_integer():  # a column with nulls comes back as floats
        cop = int(cop)
    if isinstance(cop, bool) or not isinstance(cop, int) or not 0 <= cop < len(LETTERS):
        raise RowError("cop out of range", f"got {cop!r}, expected 0 to {len(LETTERS) - 1}")
    return cop
