"""The directory of a run that trained an adapter on the built-in model, with made-up measurements: what a publication is made from."""

from __future__ import annotations

import json
from pathlib import Path

from nemotune import assets
from nemotune.files import write_json
from nemotune.lora import apply_lora
from nemotune.lora.adapter import save_adapter
from nemotune.models import build_model, read_config
from nemotune.models.saving import copy_side_files
from nemotune.recipe import dump, load

ENTRY = {"base": 0.25, "tuned": 0.875, "difference": 0.625, "low": 0.41, "high": 0.79, "n": 24, "confidence": 0.95}
LOSS = {**ENTRY, "base": 2.5, "tuned": 1.25, "difference": -1.25, "low": None, "high": None, "n": 3}


def make_run(tmp_path: Path, *overrides: str) -> Path:
    """runs/toy under `tmp_path`: recipe, environment, metrics, comparison and a LoRA adapter of rank 2 on `nemotron-tiny`."""
    run_dir = tmp_path / "runs" / "toy"
    rows = tmp_path / "secret-customer" / "rows.jsonl"
    settings = ("name=toy", f"data.train.path={rows}", "lora.rank=2", "lora.alpha=4", *overrides)
    recipe = load("quickstart", settings)
    write_json(run_dir / "recipe.json", {"recipe": dump(recipe), "data_fingerprint": "0" * 32, "code_revision": None})
    packages = {"torch": "2.13.0", "transformers": "5.23.0", "safetensors": "0.8.0"}
    write_json(
        run_dir / "environment.json",
        {"nemotune": "0.1.0", "executable": str(tmp_path / "python"), "packages": packages, "devices": [{"name": "NVIDIA L4"}]},
    )
    row = {"kind": "train", "step": 40, "epoch": 2.0, "loss": 0.3213, "tokens": 360_000}
    (run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write_json(run_dir / "data" / "stats.json", {"splits": {"train": {"rows": 1234}, "test": {"rows": 24}}})
    (run_dir / "data" / "train.jsonl").write_text('{"messages": "a row that nobody may see"}\n')
    tasks = {"tool_calls": {"exact": ENTRY}, "perplexity": {"loss": LOSS}}
    groups = {"tool_calls": {"tool": {"secret_tool": {"exact": ENTRY}}}}
    write_json(run_dir / "eval" / "compare.json", {"confidence": 0.95, "tasks": tasks, "groups": groups})
    tiny = assets.resolve("nemotron-tiny")
    assert tiny
    model = build_model(read_config(tiny)).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    apply_lora(model, recipe.lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(0.25)
    save_adapter(model, run_dir / "adapter", recipe.lora, base=recipe.model.path)
    copy_side_files(tiny, run_dir / "adapter")
    (run_dir / "adapter" / "config.json").unlink()
    return run_dir
