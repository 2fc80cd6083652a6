"""From texts to a pretrained model: indexed, blended, trained, resumed, evaluated, by the command line."""

from __future__ import annotations

import json

import pytest
from toy_blend import make_dataset


@pytest.fixture
def recipe(small_model, tmp_path):
    path = tmp_path / "blend.yaml"
    path.write_text(
        f"""
name: blended
model: {{path: {small_model}, dtype: float32, weights: random}}
data: {{format: megatron, train: blend.json, test: 0.1, template: none, sequence_length: 64}}
method: pretrain
train: {{max_steps: 12, global_batch_size: 4, micro_batch_size: 2, learning_rate: 1.0e-2, checkpoint_every: 4, eval_every: 4}}
evaluate: {{tasks: [perplexity], max_samples: 5}}
logging: {{every: 1, trackers: []}}
"""
    )
    return path


def rows(run_dir, kind: str) -> list[tuple]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in found if row["kind"] == kind]


def test_texts_are_indexed_blended_and_trained_on_and_a_resumed_run_goes_the_same_way(nemotune, recipe, small_model, tmp_path):
    texts = "".join(json.dumps({"text": f"There is {number} house." * (1 + number % 5)}) + "\n" for number in range(40))
    (tmp_path / "house.jsonl").write_text(texts)
    indexed = nemotune("data", "index", "house.jsonl", "--tokenizer", small_model, "--output", "house")
    assert indexed.returncode == 0, indexed.stdout
    assert indexed.stdout.splitlines()[-1].startswith("wrote house.idx   next: nemotune data "), indexed.stdout
    make_dataset(tmp_path / "ship", [40] * 25)
    make_dataset(tmp_path / "horse", [12, 30, 7])
    (tmp_path / "blend.json").write_text(json.dumps({"train": "0.75 house 0.25 ship", "valid": ["horse"]}))
    whole = nemotune("run", recipe)
    assert whole.returncode == 0, whole.stdout
    run_dir = tmp_path / "runs" / "blended"
    train = json.loads((run_dir / "data" / "stats.json").read_text())["splits"]["train"]
    assert train["rows_of_the_run"] == 48 and [round(found["share"], 2) for found in train["datasets"]] == [0.75, 0.25]
    losses, validation = rows(run_dir, "train"), rows(run_dir, "eval")
    assert len(losses) == 12 and [step for step, _ in validation] == [4, 8, 12] and validation[-1][1] < validation[0][1]
    summary = json.loads((run_dir / "eval" / "asked.json").read_text())
    assert summary["split"] == "test" and (run_dir / "model" / "model.safetensors").is_file()
    assert "house" in (run_dir / "report.html").read_text()

    cut = nemotune("train", recipe, "train.max_steps=5", "name=cut")
    assert cut.returncode == 0, cut.stdout
    resumed = nemotune("train", tmp_path / "runs" / "cut", "train.max_steps=12", "--resume")
    assert resumed.returncode == 0, resumed.stdout
    batches = [(row["step"], row["tokens"]) for row in map(json.loads, (run_dir / "metrics.jsonl").open()) if row["kind"] == "train"]
    again = [
        (row["step"], row["tokens"])
        for row in map(json.loads, (tmp_path / "runs" / "cut" / "metrics.jsonl").open())
        if row["kind"] == "train"
    ]
    assert again == batches
