"""Each answer is told as what it is: better, worse, right, wrong, or as good as before."""

from __future__ import annotations

import pytest

from nemotune.evaluate.rows import Row
from nemotune.evaluate.samples import choose_samples


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [(0.0, 1.0, "improved"), (0.5, 0.8, "improved"), (1.0, 0.8, "worse"), (0.0, 0.0, "both wrong"), (1.0, 1.0, "both right"), (0.8, 0.8, "unchanged")],
)  # fmt: skip
def test_an_answer_is_counted_by_its_score_before_and_after(before, after, outcome):
    base, tuned = ([Row("span_qa", 0, {"f1": score}, expected="a")] for score in (before, after))
    [kind] = choose_samples(base, tuned)
    assert {name for name, count in kind.counts.items() if count} == {outcome}
    assert [sample.outcome for sample in kind.samples] == [outcome]
