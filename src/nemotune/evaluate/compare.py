"""Base against tuned on the same rows: each metric's two values, their difference, and its interval by the paired bootstrap.

Resampled are source rows, with all their turns or documents, since those of one conversation are not independent (Efron and Tibshirani,
"An Introduction to the Bootstrap", 1993, chapters 13 and 16). Under MIN_ROWS of them there is no interval: of one row every resample is
that row again, and chance would pass for a difference. Printing is in table.py.
R resamples, C clusters (source rows), M metrics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemotune.errors import DataError
from nemotune.evaluate.rows import Row, read_rows
from nemotune.files import read_json, write_json

__all__ = ["LOWER_IS_BETTER", "MIN_ROWS", "compare", "compare_files", "judged_by", "summarize"]

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
PRIMARY = {"tool_calls": "exact", "multiple_choice": "accuracy", "span_qa": "f1", "perplexity": "perplexity"}
RESAMPLES = 10_000
MIN_ROWS = 15  # where nothing differs, percentiles of 15 rows leave 0 out in 8 of 100 comparisons, of 5 rows in 14, of 2 rows in 50
CHUNK = 500  # resamples drawn at once: counts of [500, C] in memory


def judged_by(task: str, metrics: Collection[str]) -> str:
    """The metric that a task is judged by; the first of `metrics` where that one does not apply (words have no call to be exact)."""
    return PRIMARY[task] if PRIMARY[task] in metrics else next(iter(metrics))


def summarize(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Per task and metric its "value", and "n", the number of items that it applies to."""
    return {
        task: {metric: {"value": value, "n": len(_items(mine, metric))} for metric, value in _values(mine).items()}
        for task, mine in _by_task(rows).items()
    }


def compare(
    base: Sequence[Row], tuned: Sequence[Row], *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = 0.95
) -> dict[str, Any]:
    """Per task and metric, and the same within each group: base, tuned, difference, low, high (None under MIN_ROWS), n items of so many rows.

    Raises DataError unless the rows pair exactly.
    """
    _check_pairs(base, tuned)
    right = {row.key: row for row in tuned}
    settings: dict[str, Any] = {"seed": seed, "resamples": resamples, "confidence": confidence}
    told = {"method": "paired bootstrap over source rows, percentile interval", **settings, "min_rows": MIN_ROWS}
    result: dict[str, Any] = {**told, "tasks": {}, "groups": {}}
    for task, mine in _by_task(base).items():
        pairs = [(row, right[row.key]) for row in sorted(mine, key=lambda row: row.key)]
        result["tasks"][task] = _metrics(pairs, **settings)
        result["groups"][task] = {
            kind: {name: _metrics(members, **settings) for name, members in sorted(groups.items())}
            for kind, groups in _groups(pairs).items()
        }
    return result


def compare_files(eval_dir: Path, *, seed: int = 0) -> dict[str, Any]:
    """Compare `base.jsonl` with `tuned.jsonl` of `eval_dir` and write `compare.json` beside them, with which rows were asked."""
    asked = read_json(eval_dir / "asked.json", remedy="evaluate again to write it anew")
    result = {"asked": asked} | compare(read_rows(eval_dir / "base.jsonl"), read_rows(eval_dir / "tuned.jsonl"), seed=seed)
    write_json(eval_dir / "compare.json", result)
    return result


def _by_task(rows: Sequence[Row]) -> dict[str, list[Row]]:
    tasks: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        tasks[row.task].append(row)
    return dict(tasks)


def _groups(pairs: Sequence[tuple[Row, Row]]) -> dict[str, dict[str, list[tuple[Row, Row]]]]:
    """kind of group -> its name -> its pairs."""
    groups: dict[str, dict[str, list[tuple[Row, Row]]]] = defaultdict(lambda: defaultdict(list))
    for pair in pairs:
        for kind, name in pair[0].groups.items():
            groups[kind][name].append(pair)
    return groups


def _check_pairs(base: Sequence[Row], tuned: Sequence[Row]) -> None:
    """Both sides hold the same items once each, with the same metrics and weights."""
    sides = {"base": _index(base, "base"), "tuned": _index(tuned, "tuned")}
    for one, other in (("base", "tuned"), ("tuned", "base")):
        if missing := sides[one].keys() - sides[other].keys():
            task, row, part = min(missing)
            raise DataError(
                f"eval/{other}.jsonl: lacks {len(missing)} items that eval/{one}.jsonl has, the first is {task} row {row} part {part}; "
                "evaluate both models on the same recipe and data"
            )
    for key, before in sides["base"].items():
        after = sides["tuned"][key]
        if before.scores.keys() != after.scores.keys() or before.weight != after.weight:
            raise DataError(f"eval: {key[0]} row {key[1]} part {key[2]} was scored differently for base and tuned; evaluate both again")


def _index(rows: Sequence[Row], label: str) -> dict[tuple[str, int, int], Row]:
    index = {row.key: row for row in rows}
    if len(index) != len(rows):
        raise DataError(f"eval/{label}.jsonl: holds {len(rows) - len(index)} items twice; evaluate again to write it anew")
    return index


def _values(rows: Sequence[Row]) -> dict[str, float]:
    names = _metric_names(rows)
    weights_NM, sums_NM = _arrays(rows, names)
    return {name: float(value) for name, value in _ratios(sums_NM.sum(0), weights_NM.sum(0), names)}


def _items(rows: Sequence[Row], metric: str) -> list[Row]:
    """Those that a metric applies to; perplexity is the loss in another form."""
    return [row for row in rows if ("loss" if metric == "perplexity" else metric) in row.scores]


def _metric_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.scores))


def _arrays(rows: Sequence[Row], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Weights and weighted scores, [rows, M]; both 0 where a metric does not apply."""
    weights = np.array([[row.weight if name in row.scores else 0.0 for name in names] for row in rows])
    return weights, weights * np.array([[row.scores.get(name, 0.0) for name in names] for row in rows])


def _ratios(sums_M: np.ndarray, weights_M: np.ndarray, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Each metric's weighted mean over the last axis' columns; a mean loss also gives its perplexity."""
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums_M / weights_M
    for column, name in enumerate(names):
        yield name, means[..., column]
        if name == "loss":
            yield "perplexity", np.exp(means[..., column])


def _metrics(pairs: Sequence[tuple[Row, Row]], *, seed: int, resamples: int, confidence: float) -> dict[str, dict[str, Any]]:
    base, tuned = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    differences = _resampled_differences(base, tuned, seed=seed, resamples=resamples)
    before, after = _values(base), _values(tuned)
    result = {}
    for metric, drawn_R in differences.items():
        items = _items(base, metric)
        count = len({row.row for row in items})
        ends = np.nanpercentile(drawn_R, [50 * (1 - confidence), 50 * (1 + confidence)]).tolist() if count >= MIN_ROWS else (None, None)
        result[metric] = {
            "base": before[metric], "tuned": after[metric], "difference": after[metric] - before[metric], "low": ends[0], "high": ends[1],
            "n": len(items), "rows": count, "confidence": confidence,
        }  # fmt: skip
    return result


def _resampled_differences(base: Sequence[Row], tuned: Sequence[Row], *, seed: int, resamples: int) -> dict[str, np.ndarray]:
    """Per metric tuned - base over `resamples` draws of as many source rows with replacement, the same rows on both sides ([R])."""
    names = _metric_names(base)
    clusters = np.unique([row.row for row in base], return_inverse=True)[1]
    count = int(clusters.max()) + 1
    weights_NM, base_NM = _arrays(base, names)
    columns = np.concatenate([weights_NM, base_NM, _arrays(tuned, names)[1]], axis=1)
    sums_C3M = np.zeros((count, columns.shape[1]))
    np.add.at(sums_C3M, clusters, columns)
    rng = np.random.default_rng(seed)
    drawn_R3M = np.concatenate([_draws(rng, count, min(CHUNK, resamples - done)) @ sums_C3M for done in range(0, resamples, CHUNK)])
    weights, before, after = np.split(drawn_R3M, 3, axis=1)
    return {
        name: tuned_R - base_R
        for (name, base_R), (_, tuned_R) in zip(_ratios(before, weights, names), _ratios(after, weights, names), strict=True)
    }


def _draws(rng: np.random.Generator, count: int, resamples: int) -> np.ndarray:
    """How often each of `count` clusters is drawn in each resample, [resamples, count] (float, for the product that follows)."""
    drawn = rng.integers(0, count, (resamples, count)) + np.arange(resamples)[:, None] * count
    return np.bincount(drawn.ravel(), minlength=resamples * count).reshape(resamples, count).astype(np.float64)
