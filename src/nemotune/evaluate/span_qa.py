"""Questions answered by a span of a text: exact match and F1 of words, after SQuAD's own normalisation, the best over all given answers.

As in SQuAD's evaluation script (Rajpurkar et al., arXiv 1606.05250). Only the first line of what the model says counts: a base model that
never learned to stop would else be scored on how long it goes on. Examples need meta "answers".
"""

from __future__ import annotations

import re
import string
from collections import Counter

from nemotune.data.example import Example
from nemotune.data.template import Renderer
from nemotune.errors import DataError
from nemotune.evaluate.candidate import Candidate
from nemotune.evaluate.rows import HeldOut, Row, groups_of

__all__ = ["askable", "exact_match", "f1", "score"]

MAX_NEW_TOKENS = 64


def askable(held_out: HeldOut, renderer: Renderer) -> list[Example]:
    """The questions. Raises DataError where no held-out row has answers."""
    examples = [example for example in held_out.examples if example.meta.get("answers")]
    if not examples:
        raise DataError(
            "evaluate.tasks: span_qa needs rows with answers, and none of the held-out rows has any; use data.format: squad or another task"
        )
    return examples


def score(candidate: Candidate, held_out: HeldOut) -> list[Row]:
    """One row per question. Raises DataError as `askable` does."""
    examples = askable(held_out, candidate.renderer)
    prompts = [candidate.renderer.prompt_tokens(example) for example in examples]
    said = candidate.answers(prompts, max_new_tokens=MAX_NEW_TOKENS, what="span QA")
    rows = []
    for example, prompt, text in zip(examples, prompts, said, strict=True):
        answers, prediction = example.meta["answers"], _first_line(text)
        scores = {"exact_match": max(exact_match(prediction, a) for a in answers), "f1": max(f1(prediction, a) for a in answers)}
        rows.append(
            Row(
                "span_qa", example.meta["row"], scores, groups=groups_of(example),
                prompt=candidate.text(prompt), expected=" | ".join(answers), prediction=prediction,
            )
        )  # fmt: skip
    return rows


def exact_match(prediction: str, answer: str) -> float:
    """1.0 where both say the same after normalisation."""
    return float(_normalize(prediction) == _normalize(answer))


def f1(prediction: str, answer: str) -> float:
    """The harmonic mean of precision and recall of words; 0.0 where none is shared."""
    said, right = _normalize(prediction).split(), _normalize(answer).split()
    shared = sum((Counter(said) & Counter(right)).values())
    return 2 * shared / (len(said) + len(right)) if shared else 0.0


def _normalize(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _first_line(text: str) -> str:
    return text.rpartition("</think>")[2].strip().partition("\n")[0].strip()
