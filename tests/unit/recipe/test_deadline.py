"""`train.deadline` names a point in time."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from nemotune.recipe import load
from nemotune.recipe.deadline import stop_time

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(("text", "seconds"), [("11h30m", 41400), ("90m", 5400), ("45s", 45), ("1h1m1s", 3661), ("36h", 129600)])
def test_a_duration_counts_from_the_start(text: str, seconds: int) -> None:
    assert stop_time(text, started=1000.0) == 1000 + seconds


@pytest.mark.parametrize("text", ["2026-05-01T12:00Z", "2026-05-01 12:00:00+00:00", "2026-05-01T14:00+02:00"])
def test_a_moment_is_the_same_whenever_the_command_starts(text: str) -> None:
    assert stop_time(text, started=0.0) == stop_time(text, started=5.0) == NOON


def test_a_moment_without_a_zone_is_local_time() -> None:
    assert stop_time("2026-05-01T12:00", started=0.0) == datetime(2026, 5, 1, 12).timestamp()


@pytest.mark.parametrize("written", ["2026-05-01T12:00:00+00:00", "'2026-05-01T12:00Z'", "2026-05-01 14:00:00 +02:00"])
def test_a_moment_in_a_recipe_needs_no_quotes(written: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"name: mine\nmodel: {{path: nemotron-tiny}}\ndata: {{format: chat, train: a.jsonl}}\ntrain: {{deadline: {written}}}\n",
        encoding="utf-8",
    )
    deadline = load(str(path)).train.deadline
    assert deadline is not None and stop_time(deadline, started=0.0) == NOON
