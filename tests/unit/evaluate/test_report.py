"""The report is one page that needs nothing else, shows what the run left, and says what is missing."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from toy_run import make_run

from nemotune.errors import MissingFileError
from nemotune.evaluate.report import write_report
from nemotune.train.experts import load_row

VOID = {"meta"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run_dir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "toy")


class Page(HTMLParser):
    """Checks that tags close in order, and keeps the text that people see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += " " if tag in ("td", "th") else ""

    def handle_data(self, data):
        self.text += data if not self.open or self.open[-1] != "style" else ""


def page(run_dir) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def seen(run_dir) -> str:
    return re.sub(r"\s+", " ", page(run_dir).text)


def test_a_finished_run_is_shown_whole(run_dir):
    text = seen(run_dir)
    assert "120 steps, 360,000 tokens" in text
    assert "tool_calls call_decision" in text and "95 % interval" in text and "▲ +" in text
    assert "train, step 120: 0.3" in text and "validation, step 120: 0.47" in text
    assert re.search(r"\d\d improved, 0 worse, \d both wrong, \d both right, 0 unchanged\.", text)
    assert "<parameter=city>" in text and "the weather in Oslo for 1 days?" in text
    assert "no messages 1 60" in text  # the bad row, by reason and number
    assert "12 of 16" in text and "106,496" in text
    assert "learning_rate: 0.002" in text and "6e311a4" in text
    assert "step 31: loss 2.10 is far above" in text
    assert "the training record" in text
    assert "Asked: 24 of 24 rows of test." in text


def test_gguf_files_are_listed_by_name(run_dir):
    (run_dir / "export").mkdir(exist_ok=True)
    (run_dir / "export" / "toy-q8_0.gguf").write_bytes(bytes(2_000_000))
    assert "export/toy-q8_0.gguf a file for llama.cpp 2.0 MB" in seen(run_dir)


def test_few_rows_have_no_interval_and_no_triangle(run_dir):
    path = run_dir / "eval" / "compare.json"
    found = json.loads(path.read_text())
    for entry in found["tasks"]["tool_calls"].values():
        entry |= {"low": None, "high": None, "rows": 3}
    path.write_text(json.dumps(found))
    text = seen(run_dir)
    assert f"under {found['min_rows']} rows" in text and "○ +" in text and "▲ +" not in text.partition("tool_calls by")[0]


def test_the_page_needs_no_network_no_scripts_and_no_other_file(run_dir):
    found = page(run_dir)
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "embed"})
    references = [
        value for _, attributes in found.tags for key, value in attributes.items() if key in ("src", "href", "srcset", "data", "xlink:href")
    ]
    assert references and all(reference.startswith("#") for reference in references)
    assert not [key for _, attributes in found.tags for key in attributes if key.startswith("on")]
    assert not re.search(r"url\(|@import", (run_dir / "report.html").read_text())


def test_every_link_has_its_place(run_dir):
    found = page(run_dir)
    places = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
    assert {attributes["href"][1:] for tag, attributes in found.tags if tag == "a"} <= places


def test_what_models_and_rows_say_is_shown_as_text(run_dir):
    text = write_report(run_dir).read_text()
    assert "&lt;b&gt;Request" in text
    assert "<b>Request" not in text


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        (["eval"], "This run has not been evaluated."),
        (["eval/compare.json", "eval/base.jsonl"], "Only the tuned model was evaluated"),
        (["eval/compare.json"], "Only the tuned model was evaluated"),  # a base of other rows is no base
        (["metrics.jsonl"], "This run has not been trained."),
        (["data"], "No data were prepared."),
        (["coverage.json"], "No coverage was recorded"),
        (["environment.json"], "No environment was recorded."),
        (["eval", "metrics.jsonl", "data", "coverage.json", "environment.json"], "This run has not been evaluated."),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(run_dir, missing, told):
    for name in missing:
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert told in seen(run_dir)


def test_answers_of_a_base_without_its_comparison_are_not_shown(run_dir):
    assert "base · exact" in seen(run_dir)
    (run_dir / "eval" / "compare.json").unlink()
    assert "base · exact" not in seen(run_dir)


def test_the_load_of_experts_is_shown_for_the_base_and_the_last_validation(run_dir):
    assert "Experts" not in seen(run_dir)
    base, counts = {"1": [5, 3, 2, 0], "4": [1, 1, 1, 1]}, {"1": [2, 6, 1, 1], "4": [1, 1, 1, 1]}
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step, found in ((0, base), (60, base), (120, counts)):
            file.write(json.dumps({"kind": "experts", "step": step, **load_row(found, base)}) + "\n")
    text = seen(run_dir)
    assert "at the last validation (step 120)" in text and "2 layers, drift up to 0.400" in text
    assert "1 4 50.00 % 60.00 % 0.00 % 10.00 % 0.400 4 4 25.00 % 25.00 % 25.00 % 25.00 % 0.000" in text


def test_a_deadline_is_told_until_the_run_goes_on(run_dir):
    metrics = run_dir / "metrics.jsonl"
    rows = metrics.read_text()
    metrics.write_text(rows + json.dumps({"kind": "deadline", "step": 120, "seconds_left": 70.0}) + "\n")
    assert "Stopped at its deadline; --resume goes on." in seen(run_dir)
    metrics.write_text(metrics.read_text() + rows.splitlines()[-1] + "\n")
    assert "deadline;" not in seen(run_dir)


def test_a_directory_without_a_run_is_an_error(tmp_path):
    with pytest.raises(MissingFileError, match=r"holds no recipe\.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_writing_again_gives_the_same_page(run_dir):
    first = write_report(run_dir).read_text()
    assert write_report(run_dir).read_text() == first
