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
from nemotune.evaluate.compare import MIN_ROWS
from nemotune.evaluate.rows import Row, read_rows, write_rows
from nemotune.evaluate.table import direction
from nemotune.files import write_json


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
    """Forty turns of twenty conversations, each pair of turns alike: no more is known than from twenty."""
    values = [0, 1, 0, 0, 1, 0, 0, 1, 1, 0] * 2
    single = compare(rows(values), rows([1] * 20))
    doubled_base = [replace(row, part=part) for row in rows(values) for part in (0, 1)]
    doubled_tuned = [replace(row, part=part) for row in rows([1] * 20) for part in (0, 1)]
    double = compare(doubled_base, doubled_tuned)
    assert double["tasks"]["span_qa"]["f1"]["n"] == 40 and double["tasks"]["span_qa"]["f1"]["rows"] == 20
    for key in ("base", "tuned", "difference", "low", "high"):
        assert double["tasks"]["span_qa"]["f1"][key] == pytest.approx(single["tasks"]["span_qa"]["f1"][key])


def test_loss_counts_tokens_and_perplexity_is_its_exponential():
    base = [Row("perplexity", row, {"loss": 4.0 if row % 2 else 2.0}, weight=10 if row % 2 else 30) for row in range(20)]
    tuned = [replace(row, scores={"loss": row.scores["loss"] - 1}) for row in base]
    assert summarize(base) == {
        "perplexity": {"loss": {"value": 2.5, "n": 20}, "perplexity": {"value": pytest.approx(math.exp(2.5)), "n": 20}}
    }
    metrics = compare(base, tuned)["tasks"]["perplexity"]
    assert metrics["loss"]["low"] == pytest.approx(-1) and metrics["loss"]["high"] == pytest.approx(-1)
    assert metrics["perplexity"]["difference"] == pytest.approx(math.exp(1.5) - math.exp(2.5))
    assert metrics["perplexity"]["n"] == metrics["perplexity"]["rows"] == 20
    assert direction("loss", metrics["loss"]) == direction("perplexity", metrics["perplexity"]) == "better"


def test_a_metric_counts_only_the_items_it_applies_to():
    base = [Row("tool_calls", 0, {"call_decision": 1.0, "exact": 0.0}), Row("tool_calls", 1, {"call_decision": 0.0})]
    tuned = [Row("tool_calls", 0, {"call_decision": 1.0, "exact": 1.0}), Row("tool_calls", 1, {"call_decision": 0.0})]
    metrics = compare(base, tuned)["tasks"]["tool_calls"]
    assert (metrics["call_decision"]["n"], metrics["exact"]["n"]) == (2, 1)
    assert (metrics["call_decision"]["base"], metrics["exact"]["base"], metrics["exact"]["tuned"]) == (0.5, 0.0, 1.0)
    assert (metrics["call_decision"]["rows"], metrics["exact"]["rows"]) == (2, 1)


def test_few_source_rows_give_no_interval_and_no_verdict():
    """However many turns they have: resampling one row gives that row again, and a difference of chance would be called one."""
    few, enough = MIN_ROWS - 1, MIN_ROWS
    for count in (1, few):
        base = [replace(row, part=part) for row in rows([0] * count) for part in range(30)]
        entry = compare(base, [replace(row, scores={"f1": 1.0}) for row in base])["tasks"]["span_qa"]["f1"]
        assert (entry["low"], entry["high"], entry["rows"], entry["n"]) == (None, None, count, 30 * count)
        assert entry["difference"] == 1.0 and direction("f1", entry) == "unclear"
    entry = compare(rows([0] * enough), rows([1] * enough))["tasks"]["span_qa"]["f1"]
    assert entry["low"] == entry["high"] == 1.0 and direction("f1", entry) == "better"


def test_a_metric_of_few_rows_has_no_interval_beside_one_of_many():
    base = [Row("tool_calls", row, {"call_decision": 0.0} | ({"exact": 0.0} if row < 3 else {})) for row in range(40)]
    tuned = [replace(row, scores=dict.fromkeys(row.scores, 1.0)) for row in base]
    metrics = compare(base, tuned)["tasks"]["tool_calls"]
    assert metrics["call_decision"]["low"] == 1.0 and metrics["exact"]["low"] is None and metrics["exact"]["rows"] == 3


def test_chance_is_seldom_called_a_difference_at_the_fewest_rows_that_have_an_interval():
    """5 % is promised; the percentiles of 15 rows give 7.9 % (Student's t beyond 1.96 sqrt(14 / 15)), those of 8 rows 11 %."""
    rng = np.random.default_rng(1)
    called = 0
    for _ in range(400):
        loss, change = rng.normal(5, 1, MIN_ROWS), rng.normal(0, 0.3, MIN_ROWS)
        pair = (rows(values, task="perplexity", metric="loss") for values in (loss, loss + change))
        called += direction("loss", compare(*pair, resamples=500)["tasks"]["perplexity"]["loss"]) != "unclear"
    assert 0 < called / 400 < 0.1


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
    write_json(tmp_path / "asked.json", asked := {"split": "test", "rows": 3, "of": 80})
    assert compare_files(tmp_path) == {"asked": asked} | compare(base, tuned)
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
    groups = ["held-out", "seen"] * 15
    found = rows([0, 1] * 15) + rows([2.5] * 30, task="perplexity", metric="loss")
    base = [replace(row, groups={"group": groups[row.row]}) if row.task == "span_qa" else row for row in found]
    tuned = [replace(row, scores={"f1": 1.0} if row.task == "span_qa" else {"loss": 1.5 - row.row % 2 / 10}) for row in base]
    lines = printed(comparison_table(compare(base, tuned)))
    assert ["span_qa"] in lines
    assert ["f1", "50.0", "%", "100.0", "%", "+50.0", "+33.3", "to", "+66.7", "30"] in lines
    assert ["f1", "by", "group"] in lines
    assert ["held-out", "0.0", "%", "100.0", "%", "+100.0", "+100.0", "to", "+100.0", "15"] in lines
    assert ["loss", "2.500", "1.450", "-1.050", "-1.067", "to", "-1.033", "30"] in lines
    assert ["loss", "1.450", "30"] in printed(summary_table(summarize(tuned), label="tuned"))


def test_a_table_says_why_an_interval_is_missing():
    assert ["f1", "0.0", "%", "100.0", "%", "+100.0", "under", f"{MIN_ROWS}", "rows", "2"] in printed(
        comparison_table(compare(rows([0, 0]), rows([1, 1])))
    )


def test_a_group_that_holds_all_rows_is_not_repeated():
    everyone = {"groups": {"turn": "calls"}}
    assert comparison_table(compare(rows([0, 1], **everyone), rows([1, 1], **everyone))).row_count == 2
