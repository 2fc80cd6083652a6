"""Our own engine: load, adapt, train, save. What is trained follows from `method`; the loop is `train/run.py`.

LoRA leaves `adapter/`, full tuning and pretraining leave `model/`, each with the tokenizer beside it.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from nemotune.data.prepare import Prepared
from nemotune.files import write_json
from nemotune.lora import apply_lora, coverage, save_adapter
from nemotune.models import CausalLM, load_model, load_tokenizer, save_model
from nemotune.recipe import Recipe
from nemotune.train import TrainResult
from nemotune.train import run as run_training


def train(recipe: Recipe, prepared: Prepared, *, run_dir: Path, resume: bool, console: Console) -> TrainResult:
    """Train as `recipe` says and save the outcome in `run_dir`."""
    device = default_device()
    base = recipe.model
    model = load_model(
        base.path, dtype=base.dtype, revision=base.revision, device=device, trainable=recipe.method != "lora",
        random_seed=recipe.train.seed if base.weights == "random" else None,
    )  # fmt: skip
    keys = apply_lora(model, recipe.lora, seed=recipe.train.seed) if recipe.method == "lora" else None
    write_json(run_dir / "coverage.json", coverage(model).to_json())
    result = run_training(
        model, recipe, train=prepared.train, validation=prepared.validation, run_dir=run_dir, keys=keys, resume=resume, console=console
    )
    for note in save_trained(model, recipe, run_dir):
        console.print(f"[yellow]{note}")
    return result


def save_trained(model: CausalLM, recipe: Recipe, run_dir: Path) -> list[str]:
    """Write the adapter or the model into `run_dir`. Returns notes for the user."""
    if recipe.method != "lora":
        save_model(model, run_dir / "model", overwrite=True)
        return []
    notes = save_adapter(model, run_dir / "adapter", recipe.lora, base=recipe.model.path, overwrite=True)
    load_tokenizer(recipe.model.path, recipe.model.revision).save_pretrained(run_dir / "adapter")
    return notes


def default_device() -> str:
    """The GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
