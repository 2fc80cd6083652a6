"""`write_report`: what a run left on disk, as one page that needs nothing else: no network, no scripts, no other file.

Reads the run directory only, and says so where a part is not there. The page is report.html.jinja; its charts are laid out in charts.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from nemotune.errors import MissingFileError
from nemotune.evaluate.charts import Chart, line_chart
from nemotune.evaluate.compare import MIN_ROWS, judged_by, summarize
from nemotune.evaluate.rows import Row, read_rows
from nemotune.evaluate.samples import choose_samples
from nemotune.evaluate.table import UNBOUNDED, direction, interval, number
from nemotune.files import atomic_file, read_json
from nemotune.train.metrics import read_metrics

__all__ = ["write_report"]

MEANINGS = {
    "accuracy": "the likeliest letter is the right one",
    "answer_probability": "the right letter's share of the probability of all letters",
    "call_decision": "calls a function where the row does, and answers in words where it does",
    "valid_call": "of the turns that call: what was written can be read as calls",
    "name": "of the turns that call: the right functions",
    "arguments": "of the turns that call: the right arguments, as parsed JSON",
    "exact": "of the turns that call: functions and arguments both right",
    "exact_match": "the answer equals one of the given ones, after SQuAD's normalisation",
    "f1": "words shared with the nearest given answer",
    "loss": "mean over every supervised token of the held-out rows; lower is better",
    "perplexity": "exp(loss); lower is better",
}
EVALUATE_AGAIN = "evaluate again with `nemotune eval RUN --overwrite`"
LEFT = {
    "adapter": "the adapter, in PEFT's format",
    "model": "the trained model, a Hugging Face directory",
    "export/merged": "base and adapter merged, a Hugging Face directory",
    "export/*.gguf": "a file for llama.cpp",
    "eval": "every scored row, and the comparison",
    "scores": "models that were scored alone",
    "metrics.jsonl": "the training record",
    "tensorboard": "the same for TensorBoard",
    "checkpoints": "what --resume goes on from",
    "data": "the prepared rows",
}


@dataclass(frozen=True)
class Interval:
    """A difference and its interval as places between 0 and 100, with 0 of the metric at `zero`."""

    low: float
    high: float
    difference: float
    zero: float


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path. Raises MissingFileError where `run_dir` holds no run."""
    record = _read_json(run_dir / "recipe.json", remedy="put back a copy, or run again with --overwrite")
    if record is None or not isinstance(record.get("recipe"), dict):
        raise MissingFileError(f"{run_dir}: holds no recipe.json, expected the directory of a run; `nemotune run` makes one")
    metrics = read_metrics(run_dir)
    comparison = _read_json(run_dir / "eval" / "compare.json", remedy=EVALUATE_AGAIN)
    tuned = _read_rows(run_dir / "eval" / "tuned.jsonl")
    base = _read_rows(run_dir / "eval" / "base.jsonl") if comparison else []
    page = _environment().get_template("report.html.jinja")
    text = page.render(
        record=record, recipe=record["recipe"], recipe_yaml=yaml.safe_dump(record["recipe"], sort_keys=False, allow_unicode=True),
        comparison=comparison, intervals=_intervals(comparison), summary=summarize(tuned), asked=_read_json(run_dir / "eval" / "asked.json"), kinds=choose_samples(base, tuned),
        loss_chart=_loss_chart(metrics), detail_charts=_detail_charts(metrics), last=_last(metrics, "train"), warnings=_warnings(metrics),
        loads=[row for row in metrics if row["kind"] == "experts"], is_cut=bool(metrics) and metrics[-1]["kind"] == "deadline",
        stats=_read_json(run_dir / "data" / "stats.json", remedy="prepare it again with `nemotune data RUN --overwrite`"),
        coverage=_read_json(run_dir / "coverage.json"), environment=_read_json(run_dir / "environment.json"), left=_left(run_dir),
    )  # fmt: skip
    with atomic_file(run_dir / "report.html") as aside:
        aside.write_text(text, encoding="utf-8")
    return run_dir / "report.html"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nemotune.evaluate", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"MEANINGS": MEANINGS, "MIN_ROWS": MIN_ROWS, "judged_by": judged_by}
    environment.filters |= {
        "number": number, "size": _size, "direction": lambda entry, metric: direction(metric, entry),
        "interval": lambda entry, metric: interval(metric, entry),
    }  # fmt: skip
    return environment


def _read_json(path: Path, *, remedy: str = "delete it: the report does without") -> dict[str, Any] | None:
    return read_json(path, remedy=remedy) if path.is_file() else None


def _read_rows(path: Path) -> list[Row]:
    return read_rows(path) if path.is_file() else []


def _loss_chart(metrics: list[dict[str, Any]]) -> Chart | None:
    series = {"train": _points(metrics, "train", "loss"), "validation": _points(metrics, "eval", "loss")}
    return line_chart("Loss", series, x_label="step", y_label="loss per token")


def _detail_charts(metrics: list[dict[str, Any]]) -> list[Chart]:
    told = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm", "tokens_per_second": "Tokens per second"}
    charts = (
        line_chart(title, {"": _points(metrics, "train", key)}, x_label="step", y_label="", width=300, height=170)
        for key, title in told.items()
    )
    return [chart for chart in charts if chart]


def _points(metrics: list[dict[str, Any]], kind: str, key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in metrics if row["kind"] == kind and row.get(key) is not None]


def _last(metrics: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    return next((row for row in reversed(metrics) if row["kind"] == kind), None)


def _warnings(metrics: list[dict[str, Any]]) -> list[str]:
    return [f"step {row['step']}: {row['message']}" for row in metrics if row["kind"] == "warning"]


def _intervals(comparison: dict[str, Any] | None) -> dict[tuple[str, str], Interval]:
    """Per (task, metric) that has one, the drawn interval: all shares on one scale, each loss on its own."""
    tasks = (comparison or {"tasks": {}})["tasks"]
    entries = {(task, name): entry for task, metrics in tasks.items() for name, entry in metrics.items() if entry["low"] is not None}
    shares = [entry for (_, name), entry in entries.items() if name not in UNBOUNDED]
    return {key: _interval(entry, [entry] if key[1] in UNBOUNDED else shares) for key, entry in entries.items()}


def _interval(entry: dict[str, float], peers: list[dict[str, float]]) -> Interval:
    low, high = min(0.0, *(peer["low"] for peer in peers)), max(0.0, *(peer["high"] for peer in peers))
    margin = 0.06 * (high - low) or 1.0

    def place(value: float) -> float:
        return 100 * (value - low + margin) / (high - low + 2 * margin)

    return Interval(place(entry["low"]), place(entry["high"]), place(entry["difference"]), place(0.0))


def _left(run_dir: Path) -> Iterator[tuple[str, str, int]]:
    """What lies in the run directory: path, what it is, bytes."""
    for name, meaning in LEFT.items():
        for path in sorted(run_dir.glob(name)):
            yield (
                str(path.relative_to(run_dir)),
                meaning,
                sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()),
            )


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:,.0f} {unit}" if unit in ("bytes", "KB") else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError
