"""SQuAD's own normalisation: case, articles and punctuation do not count, words do."""

from __future__ import annotations

import pytest

from nemotune.evaluate.span_qa import exact_match, f1


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "words"),
    [
        ("The Denver Broncos.", "denver broncos", 1.0, 1.0),
        ("Denver", "Denver Broncos", 0.0, 2 / 3),
        ("an apple a day", "apple day", 1.0, 1.0),
        ("24–10", "24-10", 0.0, 0.0),  # the script's punctuation is ASCII
        ("$5", "5", 1.0, 1.0),
        ("theory", "the ory", 0.0, 0.0),
        ("", "Oslo", 0.0, 0.0),
        ("Oslo Oslo", "Oslo", 0.0, 2 / 3),
        ("in  Oslo", "in Oslo", 1.0, 1.0),
    ],
)
def test_scores_equal_squads_script(prediction, answer, exact, words):
    assert exact_match(prediction, answer) == exact
    assert f1(prediction, answer) == pytest.approx(words)
