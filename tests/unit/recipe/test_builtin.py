"""The built-in recipes carry the numbers of the systems that they re-create."""

from __future__ import annotations

import pytest

from nemotune.recipe import builtin_names, load
from nemotune.recipe.load import builtin_text

NAMES = [
    "quickstart",
    "fiqa-nano-8b",
    "glaive-nano-4b",
    "medmcqa-nano-30b",
    "medmcqa-nano-30b-fast",
    "pretrain-nano-30b",
    "squad-nano-30b-full",
    "squad-nano-30b-lora",
]


def test_built_in_names_begin_with_quickstart() -> None:
    assert builtin_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_built_in_recipe_resolves_under_its_own_name_and_begins_with_a_summary(name: str) -> None:
    assert load(name).name == name
    summary = builtin_text(name).partition("\n")[0]
    assert summary.startswith("# ") and summary.endswith(".") and len(summary) <= 80


@pytest.mark.parametrize(
    ("name", "per_device", "accumulated", "gpus"), [("medmcqa-nano-30b", 4, 4, 4), ("medmcqa-nano-30b-fast", 32, 2, 4)]
)
def test_medmcqa_batches(name: str, per_device: int, accumulated: int, gpus: int) -> None:
    recipe = load(name)
    train = recipe.train
    assert (train.micro_batch_size, train.global_batch_size) == (per_device, per_device * accumulated * gpus)
    assert (recipe.parallel.nproc, train.learning_rate, train.epochs, train.optimizer) == (gpus, 2e-4, 1, "adamw_8bit")
    assert recipe.model.path == "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16"
    assert not isinstance(recipe.data.test, float | None) and recipe.data.test.split == "validation"
    assert not recipe.data.packing  # a step is so many questions


def test_medmcqa_fast_differs_in_its_steps_alone() -> None:
    slow, fast = load("medmcqa-nano-30b"), load("medmcqa-nano-30b-fast")
    same = {"model", "data", "lora", "method", "parallel", "evaluate", "export"}
    assert all(getattr(slow, part) == getattr(fast, part) for part in same)
    changed = {key for key, value in dict(slow.train).items() if value != getattr(fast.train, key)}
    assert changed == {"micro_batch_size", "global_batch_size", "eval_every", "checkpoint_every"}


def test_fiqa_numbers() -> None:
    recipe = load("fiqa-nano-8b")
    assert recipe.model.path == "nvidia/Llama-3.1-Nemotron-Nano-8B-v1"
    assert (recipe.data.train.path, recipe.data.train.config) == ("explodinggradients/fiqa", "main")
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (8, 32, 0.05)
    assert recipe.lora.targets == ("attention",)
    train = recipe.train
    assert (train.learning_rate, train.micro_batch_size, train.global_batch_size, train.epochs, train.warmup_ratio) == (2e-4, 4, 16, 3, 0.1)
    assert (recipe.data.sequence_length, recipe.data.template) == (2048, "none")


def test_glaive_numbers() -> None:
    recipe = load("glaive-nano-4b")
    assert (recipe.model.path, recipe.model.quantization) == ("nvidia/Llama-3.1-Nemotron-Nano-4B-v1.1", "nf4")
    assert recipe.data.train.path == "glaiveai/glaive-function-calling-v2" and recipe.data.packing
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (16, 32, 0.05)
    assert recipe.lora.targets == "default"  # on llama the seven projections of the system, on a hybrid its own: test_targets.py
    train = recipe.train
    assert (train.micro_batch_size, train.global_batch_size, train.epochs, train.learning_rate) == (2, 8, 3, 2e-4)
    assert (train.warmup_ratio, train.optimizer) == (0.03, "adamw_8bit")


def test_megatron_numbers() -> None:
    pretrain = load("pretrain-nano-30b")
    assert (pretrain.train.global_batch_size, pretrain.train.max_steps, pretrain.train.warmup_steps) == (3072, 39_500, 350)
    assert (pretrain.parallel.tensor, pretrain.parallel.expert, pretrain.method) == (4, 8, "pretrain")
    assert (pretrain.train.router_bias_update_rate, pretrain.train.router_aux_loss_coef, pretrain.train.eps) == (1e-3, 1e-4, 1e-5)
    full, lora = load("squad-nano-30b-full"), load("squad-nano-30b-lora")
    for recipe, method, rate in ((full, "full", 5e-6), (lora, "lora", 1e-4)):
        train = recipe.train
        assert (recipe.method, train.learning_rate) == (method, rate)
        assert (train.global_batch_size, train.max_steps, train.warmup_steps, recipe.parallel.expert) == (128, 100, 10, 8)
        assert recipe.data == full.data and train.eps == 1e-8


def test_parallel_degrees_multiply_to_the_processes() -> None:
    for name in NAMES:
        parallel = load(name).parallel
        fixed = parallel.pipeline * parallel.shard * parallel.context * parallel.tensor
        assert parallel.nproc % fixed == 0
        assert (parallel.nproc // parallel.tensor // parallel.pipeline) % parallel.expert == 0
