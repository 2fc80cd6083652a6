"""Base and tuned are paired exactly, and the bootstrap's interval is what statistics says it should be."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from nemotune.errors import DataError, MissingFileError
from nemotune.evaluate import compare, compare_files, comparison_table, summarize, summary_table
from nemotune.evaluate.rows import Row, read_rows, write_rows
from nemotune.evaluate.table import direction


def rows(values, *, task="span_qa", metric="f1", **more):
    return [Row(task, number, {metric: float(value)}, **more) for number, value in enumerate(values)]


def test_difference_and_interval_follow_the_paired_normal():
    rng = np.random.default_rng(0)
    base = rng.normal(0.5, 0.2, 400)
    tuned = base + rng.normal(0.05, 0.1, 400)
    entry = compare(rows(base), rows(tuned))["tasks"]["span_qa"]["f1"]
    difference = tuned - base
    margin = 1.96 * difference.std() / math.sqrt(400)
    assert entry["difference"] == pytest.approx(difference.mean())
    # 10,000 resamples put each end within a few per cent of the margin
    assert entry["low"] == pytest.approx(difference.mean() - margin, abs=0.06 * margin)
    assert entry["high"] == pytest.approx(difference.mean() + margin, abs=0.06 * margin)
    assert entry["n"] == 400 and entry["confidence"] == 0.95


def test_pairing_beats_what_unpaired_rows_would_give():
    rng = np.random.default_rng(1)
    base = rng.uniform(0, 1, 200)
    entry = compare(rows(base), rows(base + 0.01))["tasks"]["span_qa"]["f1"]
    assert entry["low"] == pytest.approx(0.01) and entry["high"] == pytest.approx(0.01)


def test_rows_are_paired_by_key_not_by_order():
    base, tuned = rows([0, 0, 1, 1]), rows([0, 1, 1, 1])
    assert compare(base, tuned[::-1]) == compare(base, tuned)


def test_the_same_seed_gives_the_same_interval():
    base, tuned = rows(np.arange(50) / 50), rows(np.arange(50) ** 2 / 2500)
    assert compare(base, tuned) == compare(base, tuned)
    assert compare(base, tuned, seed=1)["tasks"] != compare(base, tuned)["tasks"]


def test_turns_of_a_conversation_are_drawn_together():
    """Twenty turns of ten conversations, each pair of turns alike: no more is known than from ten."""
    values = [0, 1, 0, 0, 1, 0, 0, 1, 1, 0]
    single = compare(rows(values), rows([1] * 10))
    doubled_base = [replace(row, part=part) for row in rows(values) for part in (0, 1)]
    doubled_tuned = [replace(row, part=part) for row in rows([1] * 10) for part in (0, 1)]
    double = compare(doubled_base, doubled_tuned)
    for key in ("base", "tuned", "difference", "low", "high"):
        assert double["tasks"]["span_qa"]["f1"][key] == pytest.approx(single["tasks"]["span_qa"]["f1"][key])


def test_loss_counts_tokens_and_perplexity_is_its_exponential():
    base = [Row("perplexity", 0, {"loss": 2.0}, weight=30), Row("perplexity", 1, {"loss": 4.0}, weight=10)]
    tuned = [Row("perplexity", 0, {"loss": 1.0}, weight=30), Row("perplexity", 1, {"loss": 3.0}, weight=10)]
    assert summarize(base) == {
        "perplexity": {"loss": {"value": 2.5, "n": 2}, "perplexity": {"value": pytest.approx(math.exp(2.5)), "n": 2}}
    }
    metrics = compare(base, tuned)["tasks"]["perplexity"]
    assert metrics["loss"]["low"] == pytest.approx(-1) and metrics["loss"]["high"] == pytest.approx(-1)
    assert metrics["perplexity"]["difference"] == pytest.approx(math.exp(1.5) - math.exp(2.5))
    assert metrics["perplexity"]["n"] == 2
    assert direction("loss", metrics["loss"]) == direction("perplexity", metrics["perplexity"]) == "better"


def test_a_metric_counts_only_the_items_it_applies_to():
    base = [Row("tool_calls", 0, {"call_decision": 1.0, "exact": 0.0}), Row("tool_calls", 1, {"call_decision": 0.0})]
    tuned = [Row("tool_calls", 0, {"call_decision": 1.0, "exact": 1.0}), Row("tool_calls", 1, {"call_decision": 0.0})]
    metrics = compare(base, tuned)["tasks"]["tool_calls"]
    assert (metrics["call_decision"]["n"], metrics["exact"]["n"]) == (2, 1)
    assert (metrics["call_decision"]["base"], metrics["exact"]["base"], metrics["exact"]["tuned"]) == (0.5, 0.0, 1.0)
    assert metrics["exact"]["low"] == metrics["exact"]["high"] == 1.0


def test_groups_are_compared_apart():
    anatomy = {"groups": {"subject": "Anatomy"}}
    base = [*rows([0, 0], **anatomy), Row("span_qa", 9, {"f1": 1.0}, groups={"subject": "Surgery"})]
    tuned = [*rows([1, 1], **anatomy), Row("span_qa", 9, {"f1": 0.0}, groups={"subject": "Surgery"})]
    groups = compare(base, tuned)["groups"]["span_qa"]["subject"]
    assert groups["Anatomy"]["f1"]["difference"] == 1.0 and groups["Anatomy"]["f1"]["n"] == 2
    assert groups["Surgery"]["f1"]["difference"] == -1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tuned: tuned[1:], r"eval/tuned.jsonl: lacks 1 items that eval/base.jsonl has, the first is span_qa row 0"),
        (lambda tuned: [*tuned, Row("span_qa", 7, {"f1": 1.0})], "eval/base.jsonl: lacks 1 items"),
        (lambda tuned: [*tuned, tuned[0]], "holds 1 items twice"),
        (lambda tuned: [replace(tuned[0], scores={"exact_match": 1.0}), *tuned[1:]], "row 0 part 0 was scored differently"),
        (lambda tuned: [replace(tuned[0], weight=2.0), *tuned[1:]], "row 0 part 0 was scored differently"),
    ],
)
def test_rows_that_do_not_pair_are_an_error(change, message):
    with pytest.raises(DataError, match=message):
        compare(rows([0, 1]), change(rows([0, 1])))


def test_files_round_trip_and_give_the_same_comparison(tmp_path):
    base, tuned = rows([0, 1, 0], prompt="¿qué?\n", groups={"group": "new"}), rows([1, 1, 0])
    write_rows(tmp_path / "base.jsonl", base)
    write_rows(tmp_path / "tuned.jsonl", tuned)
    assert read_rows(tmp_path / "base.jsonl") == base
    assert compare_files(tmp_path) == compare(base, tuned)
    assert (tmp_path / "compare.json").is_file()


def test_unreadable_files_are_errors_with_a_remedy(tmp_path):
    with pytest.raises(MissingFileError, match="nemotune eval"):
        read_rows(tmp_path / "base.jsonl")
    (tmp_path / "base.jsonl").write_text('{"task": "x", "row": 0, "scores": {}}\n{"task":')
    with pytest.raises(DataError, match="line 2"):
        read_rows(tmp_path / "base.jsonl")


def printed(table) -> list[list[str]]:
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_tables_show_every_metric_and_group():
    tools = [{"groups": {"group": group}} for group in ("held-out", "held-out", "seen")]
    base = [replace(row, **more) for row, more in zip(rows([0, 0, 1]), tools, strict=True)] + rows(
        [2.5, 2.5], task="perplexity", metric="loss"
    )
    tuned = [replace(row, **more) for row, more in zip(rows([1, 1, 1]), tools, strict=True)] + rows(
        [1.5, 1.4], task="perplexity", metric="loss"
    )
    lines = printed(comparison_table(compare(base, tuned)))
    assert ["span_qa"] in lines
    assert ["f1", "33.3", "%", "100.0", "%", "+66.7", "+0.0", "to", "+100.0", "3"] in lines
    assert ["f1", "by", "group"] in lines
    assert ["held-out", "0.0", "%", "100.0", "%", "+100.0", "+100.0", "to", "+100.0", "2"] in lines
    assert ["loss", "2.500", "1.450", "-1.050", "-1.100", "to", "-1.000", "2"] in lines
    assert ["perplexity", "12.182", "4.263", "-7.919", "-8.127", "to", "-7.701", "2"] in lines
    assert ["loss", "1.450", "2"] in printed(summary_table(summarize(tuned), label="tuned"))


def test_a_group_that_holds_all_rows_is_not_repeated():
    everyone = {"groups": {"turn": "calls"}}
    assert comparison_table(compare(rows([0, 1], **everyone), rows([1, 1], **everyone))).row_count == 2
