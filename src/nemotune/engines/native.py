"""Our own engine: load, adapt, train, save. What is trained follows from `method`; the loop is `train/run.py`.

LoRA leaves `adapter/`, full tuning and pretraining leave `model/`, each with the tokenizer beside it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from nemotune.data.prepare import Prepared
from nemotune.data.template import Renderer
from nemotune.distributed import World, arrange, connect, divide
from nemotune.distributed.whole import Read, empty_whole, whole_tensors
from nemotune.distributed.world import ALONE
from nemotune.errors import UnsupportedError
from nemotune.files import read_json, staged_directory, write_json
from nemotune.lora import apply_lora, coverage, save_adapter
from nemotune.models import CausalLM, load_model, load_tokenizer, locate, read_config, save_model
from nemotune.recipe import Recipe
from nemotune.train import Deadline, TrainResult
from nemotune.train import run as run_training
from nemotune.train.out_of_memory import out_of_memory_is_readable

GENERATION_FILE = "generation_config.json"


def train(
    recipe: Recipe, prepared: Prepared, *, run_dir: Path, resume: bool, console: Console, deadline: Deadline | None = None,
    world: World = ALONE,
) -> TrainResult:  # fmt: skip
    """Train as `recipe` says, until `deadline` at most, and save the outcome in `run_dir`. Every process of `world` calls it."""
    tokenizer, settings = conversation(recipe)  # first: what is wrong with them is told before the training, not after it
    seed = recipe.train.seed
    with out_of_memory_is_readable(recipe):
        random_seed = seed if recipe.model.weights == "random" else None
        model = load_base(recipe, trainable=recipe.method != "lora", random_seed=random_seed, world=world)
        keys = apply_lora(model, recipe.lora, seed=seed) if recipe.method == "lora" else None
        if world.is_first:
            write_json(run_dir / "coverage.json", coverage(model if world.size == 1 else _empty_whole(model, recipe)).to_json())
        connect(model, world, keys)
        result = run_training(
            model, recipe, train=prepared.train, validation=prepared.validation, run_dir=run_dir, keys=keys, resume=resume, console=console,
            deadline=deadline, world=world,
        )  # fmt: skip
    with whole_tensors(model, world) as values:
        if values is not None:
            with staged_directory(run_dir / trained_name(recipe), overwrite=True) as aside:
                for note in save_trained(model, recipe, aside, values=values if world.size > 1 else None):
                    console.print(f"[yellow]{note}")
                tokenizer.save_pretrained(aside)
                write_json(aside / GENERATION_FILE, settings)
    return result


def require_device(recipe: Recipe) -> None:
    """Raises UnsupportedError for what spares a GPU's memory where there is no GPU."""
    asked = {
        "model.offload": (recipe.model.offload, "none"),
        "train.activation_checkpointing": (recipe.train.activation_checkpointing, "full"),
    }
    problems = [
        f"{key}: got '{got}', which spares a GPU's memory, and torch sees no GPU here; use {key}={instead}"
        for key, (got, instead) in asked.items()
        if got in ("experts", "offload")
    ]
    if problems and default_device() == "cpu":
        raise UnsupportedError("\n".join(problems))


def load_base(recipe: Recipe, *, trainable: bool = False, random_seed: int | None = None, world: World = ALONE) -> CausalLM:
    """The base as `recipe.model` says, where it computes; what this process of `world` holds of it. Raises what `require_device` does."""
    require_device(recipe)
    base = recipe.model
    return load_model(
        base.path, dtype=base.dtype, revision=base.revision, device=default_device(), quantization=base.quantization, offload=base.offload,
        trainable=trainable, random_seed=random_seed, arrange=partial(arrange, world=world),
        ready=partial(divide, world=world, compute_dtype=getattr(torch, base.dtype)),
    )  # fmt: skip


def trained_name(recipe: Recipe) -> str:
    """The directory of the run that holds what was trained."""
    return "adapter" if recipe.method == "lora" else "model"


def save_trained(model: CausalLM, recipe: Recipe, directory: Path, *, values: Read | None = None) -> list[str]:
    """Write the adapter or the model as `directory`; `values` gives whole tensors where `model` has parts. Returns notes for the user."""
    if values is not None:
        model = _empty_whole(model, recipe)
    if recipe.method != "lora":
        save_model(model, directory, overwrite=True, values=values)
        return []
    return save_adapter(model, directory, recipe.lora, base=recipe.model.path, overwrite=True, values=values)


def _empty_whole(model: CausalLM, recipe: Recipe) -> CausalLM:
    """The model as one process would hold it, without values."""
    whole = empty_whole(model)
    if recipe.method == "lora":
        apply_lora(whole, recipe.lora)
    return whole


def conversation(recipe: Recipe) -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """What it takes to talk to the model as it is trained: tokenizer and template, and settings with every token that ends an answer."""
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
    renderer = Renderer(tokenizer, template=recipe.data.template, thinking=recipe.data.thinking)
    tokenizer.chat_template = renderer.chat_template or tokenizer.chat_template
    base = locate(recipe.model.path, recipe.model.revision, weights=False)
    stops = sorted({*read_config(base).eos_token_id, *renderer.stop_ids})
    path = base / GENERATION_FILE
    settings = read_json(path, remedy="mend it, or delete it: config.json names the token that ends a text too") if path.is_file() else {}
    return tokenizer, {**settings, "eos_token_id": stops}


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
