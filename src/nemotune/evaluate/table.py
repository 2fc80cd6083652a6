"""The evaluation as a table for the terminal: base, tuned, difference and its interval; or one model's values alone."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from nemotune.evaluate.compare import LOWER_IS_BETTER, MIN_ROWS, PRIMARY, judged_by

__all__ = ["comparison_table", "direction", "interval", "number", "summary_table"]

UNBOUNDED = frozenset({"loss", "perplexity"})  # every other metric is a share and shown in per cent


def comparison_table(comparison: dict[str, Any]) -> Table:
    """Every metric of every task; below each task its groups, by the metric that the task is judged by."""
    table = _table("base", "tuned", "difference", f"{100 * comparison['confidence']:.0f} % interval")
    for task, metrics in comparison["tasks"].items():
        table.add_row(f"[bold]{task}[/]")
        for metric, entry in metrics.items():
            table.add_row(f"  {metric}", *_cells(metric, entry))
        for kind, groups in comparison["groups"][task].items():
            if len(groups) > 1:
                _add_groups(table, task, kind, groups)
        table.add_section()
    return table


def summary_table(summary: dict[str, dict[str, dict[str, float]]], *, label: str) -> Table:
    """One model's metrics, where there is nothing to compare them with."""
    table = _table(label)
    for task, metrics in summary.items():
        table.add_row(f"[bold]{task}[/]")
        for metric, entry in metrics.items():
            table.add_row(f"  {metric}", number(metric, entry["value"]), f"{entry['n']:,}")
        table.add_section()
    return table


def number(metric: str, value: float, *, signed: bool = False) -> str:
    """A value as people read it: shares in per cent, losses with three decimals, a hopeless perplexity as a power of ten."""
    if metric in UNBOUNDED:
        form = ",.3f" if abs(value) < 1e4 else ".2e"
        return f"{value:{'+' if signed else ''}{form}}"
    return f"{100 * value:+.1f}" if signed else f"{100 * value:.1f} %"


def direction(metric: str, entry: dict[str, Any]) -> str:
    """better, worse, or unclear where the interval holds 0 or too few rows gave none."""
    if entry["low"] is None or entry["low"] <= 0 <= entry["high"]:
        return "unclear"
    return "better" if (entry["difference"] > 0) != (metric in LOWER_IS_BETTER) else "worse"


def _table(*headings: str) -> Table:
    """Narrow enough for 80 columns: only the first one wraps."""
    table = Table(header_style="dim", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("evaluation")
    for heading in (*headings, "items"):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _add_groups(table: Table, task: str, kind: str, groups: dict[str, dict[str, Any]]) -> None:
    table.add_row(f"  {PRIMARY[task]} by {kind}")
    for name, metrics in groups.items():
        metric = judged_by(task, metrics)
        other = "" if metric == PRIMARY[task] else f" ({metric})"
        table.add_row(f"    {escape(name)}{other}", *_cells(metric, metrics[metric]))


def interval(metric: str, entry: dict[str, Any]) -> str:
    """Its two ends, or that there were too few rows for one."""
    if entry["low"] is None:
        return f"under {MIN_ROWS} rows"
    return f"{number(metric, entry['low'], signed=True)} to {number(metric, entry['high'], signed=True)}"


def _cells(metric: str, entry: dict[str, Any]) -> tuple[str, ...]:
    colour = {"better": "green", "worse": "red", "unclear": "dim"}[direction(metric, entry)]
    difference = number(metric, entry["difference"], signed=True)
    values = number(metric, entry["base"]), number(metric, entry["tuned"])
    return (*values, f"[{colour}]{difference}[/]", interval(metric, entry), f"{entry['n']:,}")
