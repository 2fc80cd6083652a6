"""Charts show every value inside the plot, on round ticks, with labels that do not overlap."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from nemotune.evaluate.charts import LABEL_GAP, MAX_POINTS, line_chart


def chart(series):
    return line_chart("Loss", series, x_label="step", y_label="loss")


@pytest.mark.parametrize(
    "points",
    [
        [(1, 4.2), (2, 3.1), (3, 0.02)],
        [(10, 0.0)],
        [(1, 2.0), (2, 2.0)],
        [(step, 2e-4 * (1 - step / 50)) for step in range(50)],
        [(1, -3.0), (500, 12_000.0)],
    ],
)
def test_points_and_ticks_lie_inside_the_plot(points):
    c = chart({"train": points})
    (line,) = c.lines
    assert len(line.points) == len(points)
    assert all(c.left <= p.x <= c.right and c.top <= p.y <= c.bottom for p in line.points)
    assert all(c.top - 0.01 <= tick.at <= c.bottom + 0.01 for tick in c.y_ticks)
    assert all(c.left - 0.01 <= tick.at <= c.right + 0.01 for tick in c.x_ticks)
    assert 2 <= len(c.y_ticks) <= 9 and len({tick.label for tick in c.y_ticks}) == len(c.y_ticks)


def test_higher_values_lie_higher():
    (line,) = chart({"train": [(1, 4.0), (2, 3.0), (3, 1.0)]}).lines
    ys = [p.y for p in line.points]
    assert ys == sorted(ys)
    assert line.points[0].title == "train, step 1: 4" and line.last == "1"


def test_a_long_line_is_drawn_as_means():
    points = [(step, float(step % 2)) for step in range(1, 2001)]
    (line,) = chart({"train": points}).lines
    assert len(line.points) <= MAX_POINTS
    assert line.points[-1].title.startswith("train, step 2,000")


def test_names_at_the_line_ends_do_not_overlap():
    c = chart({"train": [(1, 1.0), (2, 0.5)], "validation": [(1, 1.0), (2, 0.501)], "other": [(1, 3.0), (2, 0.499)]})
    labels = sorted(line.label_y for line in c.lines)
    assert all(below - above >= LABEL_GAP for above, below in pairwise(labels))


def test_nothing_to_draw_is_none_and_what_is_not_finite_is_left_out():
    assert chart({"train": [], "validation": []}) is None
    assert chart({"train": [(1, math.nan)]}) is None
    c = chart({"train": [(1, 1.0), (2, math.inf), (3, 0.5)], "validation": []})
    assert [line.name for line in c.lines] == ["train"] and len(c.lines[0].points) == 2
