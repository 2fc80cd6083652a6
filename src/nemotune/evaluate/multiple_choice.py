"""Multiple choice by likelihood: each option's letter as the answer to the training prompt, spelt token for token as in training.

accuracy: the likeliest letter is the right one. answer_probability: the right letter's share of the probability of all letters.
Examples need meta "options" and "answer" (a letter).
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

import numpy as np

from nemotune.data.example import Example, RowError
from nemotune.data.template import Renderer
from nemotune.errors import DataError
from nemotune.evaluate.candidate import Candidate
from nemotune.evaluate.likelihood import Query
from nemotune.evaluate.rows import HeldOut, Row, groups_of

__all__ = ["askable", "score"]


def askable(held_out: HeldOut, renderer: Renderer) -> list[Example]:
    """The questions. Raises DataError where no held-out row has options, or the template puts reasoning before the letter."""
    examples = [example for example in held_out.examples if example.meta.get("options")]
    if not examples:
        raise DataError(
            "evaluate.tasks: multiple_choice needs rows with options, and none of the held-out rows has any; use data.format: medmcqa or another task"
        )
    _queries(renderer, examples[0])
    return examples


def score(candidate: Candidate, held_out: HeldOut) -> list[Row]:
    """One row per question. Raises DataError as `askable` does."""
    examples = askable(held_out, candidate.renderer)
    queries = [_queries(candidate.renderer, example) for example in examples]
    answers = iter(candidate.log_probs([query for asked in queries for query in asked], what="multiple choice"))
    return [
        _row(candidate, example, asked[0], _per_letter([next(answers) for _ in asked]))
        for example, asked in zip(examples, queries, strict=True)
    ]


def _queries(renderer: Renderer, example: Example) -> list[Query]:
    """One forward over the prompt where every letter is a single token, else one per letter."""
    prompt = renderer.prompt_tokens(example)
    letters = [_answer_tokens(renderer, example.answered(letter), len(prompt)) for letter in _letters(example)]
    if all(len(tokens) == 1 for tokens in letters):
        return [Query(prompt, [len(prompt) - 1] * len(letters), [tokens[0] for tokens in letters])]
    return [Query(prompt + tokens[:-1], range(len(prompt) - 1, len(prompt) - 1 + len(tokens)), tokens) for tokens in letters]


def _answer_tokens(renderer: Renderer, example: Example, start: int) -> list[int]:
    """The tokens that training would supervise for this answer, without the one that ends it."""
    try:
        encoded = renderer.encode(example)[-1]
    except RowError as error:
        raise DataError(
            f"evaluate.tasks: multiple_choice scores a letter right after the prompt, which this template does not allow ({error}); set data.thinking=false"
        ) from error
    end = max(position for position, trained in enumerate(encoded.mask) if trained)
    return encoded.tokens[start:end]


def _per_letter(answers: Sequence[np.ndarray]) -> np.ndarray:
    """The log likelihood of each letter, from one query about all or one about each."""
    return answers[0] if len(answers) == 1 else np.array([tokens.sum() for tokens in answers])


def _row(candidate: Candidate, example: Example, asked: Query, log_likelihoods: np.ndarray) -> Row:
    letters, answer = _letters(example), example.meta["answer"]
    shares = np.exp(log_likelihoods - np.logaddexp.reduce(log_likelihoods))
    chosen = letters[int(shares.argmax())]
    return Row(
        task="multiple_choice",
        row=example.meta["row"],
        scores={"accuracy": float(chosen == answer), "answer_probability": float(shares[letters.index(answer)])},
        groups=groups_of(example),
        prompt=candidate.text(asked.tokens[: asked.positions[0] + 1]),
        expected=answer,
        prediction=f"{chosen} ({', '.join(f'{letter} {share:.1%}' for letter, share in zip(letters, shares, strict=True))})",
    )


def _letters(example: Example) -> str:
    return ascii_uppercase[: len(example.meta["options"])]
