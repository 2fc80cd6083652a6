"""What a person, or a log, sees of long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from nemotune.data import progress as data_progress
from nemotune.train.progress import StepBar


@pytest.fixture
def clock(monkeypatch):
    """`clock.now` is what the monotonic clock says."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def trained(console, clock, *, total=1000, seconds_a_step=0.1, done=0) -> list[str]:
    with StepBar(console, total=total, done=done) as bar:
        for step in range(done, total):
            clock.now += seconds_a_step
            bar.advance(loss=2.0, tokens_per_second=1234.5, memory_bytes=10**9)
            if step == done:
                bar.note("validation 1.5000")
    return console.file.getvalue().splitlines()


def test_a_log_gets_the_first_step_the_last_and_a_line_every_half_minute(clock):
    lines = trained(Console(file=io.StringIO(), width=40), clock)
    assert lines[0] == "step 1 of 1,000: loss 2.0000  1,234 tokens/s  1.0 GB  0:01:40 left"
    assert [line.split(" of ")[0] for line in lines] == ["step 1", "step 300", "step 600", "step 900", "step 1,000"]
    assert lines[1] == "step 300 of 1,000: loss 2.0000  1,234 tokens/s  1.0 GB  validation 1.5000  0:01:10 left"


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("last", [4, 6])
def test_the_last_line_is_that_of_the_last_step_with_its_validation(clock, last, terminal):
    """Which early stopping or a deadline may have made of any step."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    with StepBar(console, total=6, done=0) as bar:
        for step in range(1, last + 1):
            bar.advance(loss=7.0 - step, tokens_per_second=10, memory_bytes=10**9)
            if step % 2 == 0:
                bar.note(f"validation {step}.5000 (step {step})")
    told = console.file.getvalue()
    if terminal:
        assert f"loss {7 - last}.0000  10 tokens/s  1.0 GB  validation {last}.5000 (step {last})" in told
    else:
        lines = [line.rpartition("  ")[0] for line in told.splitlines()]
        ends = f"step {last} of 6: loss {7 - last}.0000  10 tokens/s  1.0 GB  validation {last}.5000 (step {last})"
        assert lines == ["step 1 of 6: loss 6.0000  10 tokens/s  1.0 GB", ends]


def test_a_run_without_a_step_or_that_breaks_off_has_no_last_line(clock):
    console = Console(file=io.StringIO())
    with StepBar(console, total=6, done=6):
        pass
    with pytest.raises(KeyboardInterrupt), StepBar(console, total=6, done=0) as bar:
        for _ in range(3):
            bar.advance(loss=1.0, tokens_per_second=10, memory_bytes=10**9)
        raise KeyboardInterrupt
    assert [line.split(":")[0] for line in console.file.getvalue().splitlines()] == ["step 1 of 6"]


def test_a_resumed_run_counts_on_and_its_time_left_is_that_of_its_own_steps(clock):
    lines = trained(Console(file=io.StringIO()), clock, done=990, seconds_a_step=2.0)
    assert [line.split(":")[0] for line in lines] == ["step 991 of 1,000", "step 1,000 of 1,000"]
    assert lines[0].endswith("0:00:18 left")


def test_a_terminal_gets_a_bar(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    assert "1000/1000" in "".join(trained(console, clock)) and "step 1 of" not in console.file.getvalue()


def test_rows_are_counted_in_a_log_too(clock, capsys):
    with data_progress.progress("reading rows.jsonl", total=4000) as advance:
        for _ in range(4000):
            clock.now += 0.02
            advance(1)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "reading rows.jsonl: 1,500 of 4,000, 50/s, 0:00:50 left",
        "reading rows.jsonl: 3,000 of 4,000, 50/s, 0:00:20 left",
    ]


def test_names_with_brackets_are_no_markup(clock, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with data_progress.progress("reading rows[/1].jsonl", total=2) as advance:
        advance(1)
    assert "rows[/1].jsonl" in capsys.readouterr().err


def test_work_whose_first_item_takes_long_says_so(clock, capsys):
    with data_progress.progress("tool calls, base", total=40) as advance:
        for count in (0, 0, 2):
            clock.now += 31
            advance(count)
    assert capsys.readouterr().err.splitlines() == ["tool calls, base: 0 of 40"] * 2 + ["tool calls, base: 2 of 40, 0.022/s, 0:29:27 left"]


def test_short_work_leaves_no_line(clock, capsys):
    with data_progress.progress("reading") as advance:
        advance(10)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "total, line", [(4 * 10**9, "merging: 1.00 of 4.00 GB, 17 MB/s, 0:03:00 left"), (None, "merging: 1.00 GB, 17 MB/s")]
)
def test_bytes_are_told_in_gigabytes(clock, capsys, total, line):
    with data_progress.progress("merging", total=total, in_bytes=True) as advance:
        clock.now += 60
        advance(10**9)
    assert capsys.readouterr().err.splitlines() == [line]
