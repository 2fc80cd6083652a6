"""Perplexity: the mean loss over every supervised token of the held-out documents, each token counting once.

The same number as the validation loss of training, on any split. compare.py turns the mean loss into perplexity, exp(loss).
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from nemotune.data.split import Document
from nemotune.data.template import Renderer
from nemotune.errors import DataError
from nemotune.evaluate.candidate import Candidate
from nemotune.evaluate.likelihood import Query
from nemotune.evaluate.rows import HeldOut, Row, groups_of

__all__ = ["askable", "score"]

SHOWN_TOKENS = 200


def askable(held_out: HeldOut, renderer: Renderer) -> list[Document]:
    """The documents with supervised tokens. Raises DataError where there are none."""
    documents = [document for document in held_out.documents if document.mask[1:].any()]
    if not documents:
        raise DataError("evaluate.tasks: perplexity needs supervised tokens, and the held-out rows have none; give data.test other rows")
    return documents


def score(candidate: Candidate, held_out: HeldOut) -> list[Row]:
    """One row per document, weighted by its supervised tokens. Raises DataError as `askable` does."""
    documents = askable(held_out, candidate.renderer)
    groups = {example.meta["row"]: groups_of(example) for example in held_out.examples}
    answers = candidate.log_probs([_query(document) for document in documents], what="perplexity")
    seen: Counter[int] = Counter()
    rows = []
    for document, answer in zip(documents, answers, strict=True):
        text = candidate.text(document.tokens[:SHOWN_TOKENS].tolist())
        scores = {"loss": float(-answer.mean(dtype=np.float64))}
        rows.append(
            Row("perplexity", document.row, scores, part=seen[document.row], weight=len(answer), groups=groups[document.row], prompt=text)
        )
        seen[document.row] += 1
    return rows


def _query(document: Document) -> Query:
    """Every supervised token, asked for at the position before it; a first token has nothing before it."""
    targets = np.flatnonzero(document.mask[1:]) + 1
    return Query(document.tokens.tolist(), (targets - 1).tolist(), document.tokens[targets].tolist())
