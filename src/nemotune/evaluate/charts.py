"""Where the lines, ticks and labels of a chart lie: numbers only. The page's template (report.html.jinja) draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Chart", "Line", "Point", "Tick", "line_chart"]

MAX_POINTS = 240  # of a line; a longer one is drawn as means of neighbours, else hover targets overlap
LABEL_GAP = 15  # pixels between the names of two lines


@dataclass(frozen=True)
class Point:
    """A place in pixels, and what it says on hover."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Tick:
    """A place along one side, in pixels, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """`name` stands at the line's end, `label_y` pixels down, with `last`, its last value."""

    name: str
    last: str
    points: tuple[Point, ...]
    label_y: float

    @property
    def path(self) -> str:
        """The `points` attribute of an SVG polyline."""
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)


@dataclass(frozen=True)
class Chart:
    """All of a chart in pixels; the plot is the rectangle left, top, right, bottom."""

    title: str
    x_label: str
    y_label: str
    width: int
    height: int
    left: int
    top: int
    right: int
    bottom: int
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]


def line_chart(
    title: str, series: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str, y_label: str, width: int = 760, height: int = 300
) -> Chart | None:
    """A chart of {name: [(x, y), ...]}, x ascending; None where there is nothing to draw. Points that are not finite are left out."""
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    drawn = {name: _thin(points) for name, points in finite.items() if points}
    if not drawn:
        return None
    left, top, right, bottom = 62, 14, width - (130 if any(drawn) else 56), height - 42
    x_range, y_values = (_range([point[axis] for points in drawn.values() for point in points]) for axis in (0, 1))
    x_ticks, y_ticks = _nice_ticks(*x_range, count=width // 80), _nice_ticks(*y_values, count=height // 55)
    y_range = (y_ticks[0], y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * _share(x, x_range), bottom - (bottom - top) * _share(y, y_range)

    label_ys = _spread([place(*points[-1])[1] for points in drawn.values()])
    lines = tuple(
        Line(
            name,
            _number(points[-1][1]),
            tuple(Point(*place(x, y), f"{name}, {x_label} {x:,.0f}: {_number(y)}") for x, y in points),
            label_y,
        )
        for (name, points), label_y in zip(drawn.items(), label_ys, strict=True)
    )
    return Chart(
        title, x_label, y_label, width, height, left, top, right, bottom,
        x_ticks=tuple(Tick(place(x, 0)[0], f"{x:,.0f}") for x in x_ticks if x == int(x) and x_range[0] <= x <= x_range[1]),
        y_ticks=tuple(Tick(place(0, y)[1], _number(y)) for y in y_ticks),
        lines=lines,
    )  # fmt: skip


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, each the mean of its neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    return [(bucket[-1][0], sum(y for _, y in bucket) / len(bucket)) for bucket in buckets]


def _nice_ticks(low: float, high: float, *, count: int) -> list[float]:
    """About `count` round numbers that span [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * number for number in range(first, last + 1)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest value, put apart where they are one."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _share(value: float, bounds: tuple[float, float]) -> float:
    return (value - bounds[0]) / (bounds[1] - bounds[0])


def _spread(ys: Sequence[float]) -> list[float]:
    """The heights, the lower labels pushed down until no two overlap."""
    placed = list(ys)
    order = sorted(range(len(ys)), key=lambda index: ys[index])
    for above, below in pairwise(order):
        placed[below] = max(placed[below], placed[above] + LABEL_GAP)
    return placed


def _number(value: float) -> str:
    """Four significant digits at most, thousands parted, small numbers as powers of ten."""
    if value and abs(value) < 1e-3:
        return f"{value:.2e}".replace(".00e", "e").replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
