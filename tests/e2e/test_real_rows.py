"""Real rows, the Nemotron-3 tokenizer and NVIDIA's template, on a small random model: data, training, evaluation, merge, report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

DATA = os.environ.get("NEMOTUNE_TEST_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="NEMOTUNE_TEST_DATA is not set")
SHRINK = Path(__file__).parents[2] / "examples" / "shrink_model.py"
HERE = ("parallel={}", "train.optimizer=adamw", "model.dtype=float32", "train.max_steps=2", "evaluate.max_samples=6", "export.merged=true")


@pytest.fixture(scope="module")
def small_nano(tmp_path_factory) -> Path:
    """Nemotron-3-Nano in a thousandth of its size, made by the script in examples/."""
    out, nemotron = tmp_path_factory.mktemp("nano") / "small", Path(DATA) / "data" / "nemotron"
    words = {
        "--config": nemotron / "configs" / "NVIDIA-Nemotron-3-Nano-30B-A3B.config.VERBATIM.json",
        "--tokenizer": nemotron / "tokenizer" / "nemotron3_tokenizer.RECONSTRUCTED.json.gz",
        "--template": nemotron / "chat_templates" / "nemotron_3_nano.jinja",
        "--out": out,
    }
    subprocess.run([sys.executable, SHRINK, *(str(word) for pair in words.items() for word in pair)], check=True)
    return out


def first_rows(path, count, target):
    with path.open(encoding="utf-8") as file:
        target.write_text("".join(islice(file, count)), encoding="utf-8")
    return target


def went_through(result, run_dir, *, rows):
    """Every stage left its files, and every row is accounted for."""
    assert result.returncode == 0, result.stdout
    for name in (
        "recipe.json",
        "metrics.jsonl",
        "coverage.json",
        "eval/compare.json",
        "report.html",
        "export/merged/config.json",
        "adapter/adapter_config.json",
    ):
        assert (run_dir / name).is_file(), name
    stats = json.loads((run_dir / "data" / "stats.json").read_text())
    source = stats["sources"]["train"]
    assert source["rows"] == rows
    used = set()
    for name in stats["splits"]:
        with (run_dir / "data" / f"{name}.jsonl").open() as file:
            used |= {json.loads(line)["meta"]["row"] for line in file}
    with (run_dir / "data" / "rejected.jsonl").open() as file:
        rejected = [json.loads(line) for line in file]
    assert all(row["reason"] for row in rejected)
    assert used | {row["row"] for row in rejected} == set(range(rows))
    return stats


def test_medmcqa(nemotune, small_nano, tmp_path):
    rows = first_rows(Path(DATA) / "data/medmcqa/dev_first3000.jsonl", 400, tmp_path / "rows.jsonl")
    held = ("data.validation=0.05", "data.test=0.05", "train.global_batch_size=8")
    result = nemotune("run", "medmcqa-nano-30b", f"model.path={small_nano}", f"data.train={rows}", *held, *HERE)
    went_through(result, tmp_path / "runs" / "medmcqa-nano-30b", rows=400)
    comparison = json.loads((tmp_path / "runs" / "medmcqa-nano-30b" / "eval" / "compare.json").read_text())
    assert comparison["tasks"]["multiple_choice"]["accuracy"]["n"] == 6


def test_fiqa(nemotune, small_nano, tmp_path):
    rows = first_rows(Path(DATA) / "data/fiqa/test.jsonl", 60, tmp_path / "rows.jsonl")
    held = ("data.validation=0.05", "data.test=0.1", "train.global_batch_size=4", "evaluate.tasks=[perplexity]")
    result = nemotune("run", "fiqa-nano-8b", f"model.path={small_nano}", f"data.train={rows}", *held, *HERE)
    went_through(result, tmp_path / "runs" / "fiqa-nano-8b", rows=60)


def test_glaive(nemotune, small_nano, tmp_path):
    rows = Path(DATA) / "data/glaive/raw_format_reconstructed_300.jsonl"
    changed = (
        "lora.targets=default",
        "export.gguf=[]",
        "train.global_batch_size=2",
        "data.sequence_length=2048",
    )
    result = nemotune("run", "glaive-nano-4b", f"model.path={small_nano}", f"data.train={rows}", *changed, *HERE)
    stats = went_through(result, tmp_path / "runs" / "glaive-nano-4b", rows=300)
    assert "learned beside NF4 weights" in result.stdout
    assert sum(entry["count"] for entry in stats["sources"]["train"]["rejected"].values()) <= 3


def test_squad(nemotune, small_nano, tmp_path):
    rows = first_rows(Path(DATA) / "data/squad/xquad_en.hf_schema.jsonl", 200, tmp_path / "rows.jsonl")
    held = ("data.validation=0.02", "data.test=0.05", "train.global_batch_size=2", "train.micro_batch_size=1")
    result = nemotune("run", "squad-nano-30b-lora", f"model.path={small_nano}", f"data.train={rows}", *held, *HERE)
    went_through(result, tmp_path / "runs" / "squad-nano-30b-lora", rows=200)
