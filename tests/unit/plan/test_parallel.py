"""Degrees that do not fit a model are told from its config, all at once, with the nearest that do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from random_models import make

from nemotune.errors import NemotuneError, RecipeError, UnsupportedError
from nemotune.models import parse_config
from nemotune.plan.parallel import check_parallel, require_fit
from nemotune.recipe import Recipe, builtin_names, load
from nemotune.recipe.degrees import Degrees

REAL = os.environ.get("NEMOTUNE_TEST_DATA")


def config(variant: str) -> Any:
    found = make("hybrid", moe_intermediate_size=25) if variant == "odd_experts" else make(variant)
    return parse_config(found.config.to_dict())


def recipe(**changes: Any) -> Recipe:
    tree = {"name": "x", "model": {"path": "nowhere"}, "data": {"format": "chat", "train": "rows.jsonl"}}
    return Recipe.model_validate({**tree, **changes})


def told(degrees: Degrees, variant: str, **changes: Any) -> str:
    with pytest.raises(NemotuneError) as error:
        require_fit(recipe(**changes), degrees, config(variant))
    return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize(
    ("variant", "degrees"),
    [
        ("hybrid", Degrees(tensor=2)),
        ("hybrid", Degrees(data=2, expert=2)),
        ("hybrid", Degrees(pipeline=6, shard=3, context=2, expert=6)),
        ("groups_equal_heads", Degrees(tensor=4)),
        ("odd_experts", Degrees(data=2, tensor=2, expert=2)),  # which keep their width
        ("llama", Degrees(tensor=4)),  # 2 key-value heads: each is held by two ranks
        ("llama", Degrees(pipeline=3)),
        ("llama_tied", Degrees(pipeline=2)),  # frozen under LoRA
        ("llama_biased", Degrees(data=2, shard=2)),
    ],
)
def test_degrees_that_fit_pass(variant: str, degrees: Degrees) -> None:
    require_fit(recipe(), degrees, config(variant))


@pytest.mark.parametrize(
    ("variant", "degrees", "expected"),
    [
        ("hybrid", Degrees(tensor=4), "parallel.tensor: got 4, which does not divide the model's n_groups (2); nearest that does: 2"),
        ("one_group", Degrees(tensor=2), "n_groups (1); nearest that does: 1"),
        ("llama", Degrees(tensor=3), "divide the model's num_attention_heads (4), intermediate_size (64), num_key_value_heads (2); nearest that does: 4"),
        ("llama", Degrees(tensor=5), "vocab_size (96), num_attention_heads (4), intermediate_size (64), num_key_value_heads (2); nearest that does: 4"),
        ("llama", Degrees(tensor=8), "num_attention_heads (4); nearest that does: 4"),
        ("wide_heads", Degrees(tensor=2), "n_groups (3)"),
        ("odd_experts", Degrees(tensor=2), "parallel.tensor: got 2, which does not divide the model's moe_intermediate_size (25)"),
        ("hybrid", Degrees(data=4, expert=4), "parallel.expert: got 4, expected a divisor of the model's 6 experts; nearest: 3"),
        ("llama", Degrees(data=2, expert=2), "parallel.expert: got 2, and the model has no experts; set parallel.expert=1"),
        ("llama", Degrees(pipeline=4), "parallel.pipeline: got 4, expected at most the model's 3 layers"),
    ],
)  # fmt: skip
def test_a_degree_that_does_not_fit_is_told_with_the_nearest(variant: str, degrees: Degrees, expected: str) -> None:
    found = told(degrees, variant)
    assert found.startswith("RecipeError: ") and expected in found


def test_all_that_does_not_fit_is_told_at_once() -> None:
    found = told(Degrees(pipeline=9, data=4, tensor=3, expert=4), "hybrid", lora={"dora": True})
    assert [line.partition(": ")[0] for line in found.removeprefix("RecipeError: ").splitlines()] == [
        "parallel.tensor", "parallel.expert", "parallel.pipeline", "lora.dora",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "degrees", "changes", "expected"),
    [
        ("hybrid", Degrees(shard=2, tensor=2), {"model": {"path": "x", "quantization": "nf4"}}, "model.quantization: nf4 cannot be divided by parallel.shard=2 parallel.tensor=2; use parallel.shard=1 parallel.tensor=1"),
        ("hybrid", Degrees(data=2, expert=2), {"train": {"optimizer": "adamw_8bit"}}, "train.optimizer: adamw_8bit works with parallel.data alone, got parallel.expert=2"),
        ("llama", Degrees(context=2), {"train": {"optimizer": "adamw_8bit"}}, "train.optimizer: adamw_8bit works with parallel.data alone, got parallel.context=2"),
        ("hybrid", Degrees(data=2, expert=2), {"model": {"path": "x", "offload": "experts"}}, "model.offload: experts cannot be lent and divided, got parallel.expert=2"),
        ("hybrid", Degrees(context=2), {"method": "full", "train": {"router_aux_loss_coef": 1e-4}}, "train.router_aux_loss_coef: the loss is that of whole documents, which parallel.context=2 divides"),
        ("llama", Degrees(tensor=2), {"lora": {"dora": True}}, "lora.dora: DoRA needs whole rows"),
        ("llama", Degrees(shard=2), {"lora": {"dora": True}}, "lora.dora: DoRA needs whole rows of a weight when it begins, which parallel.shard=2"),
        ("llama_biased", Degrees(tensor=2), {}, "parallel.tensor: the model's output projections have biases (attention_bias, mlp_bias)"),
        ("llama_tied", Degrees(pipeline=2), {"method": "full"}, "parallel.pipeline: got 2, and the embeddings are tied"),
        ("llama", Degrees(tensor=2), {"lora": {"targets": ["attention", "embed_tokens"]}}, "lora.targets: embeddings are not adapted with parallel.tensor over 1"),
    ],
)  # fmt: skip
def test_what_is_not_built_for_degrees_is_refused_by_key(variant: str, degrees: Degrees, changes: dict[str, Any], expected: str) -> None:
    assert told(degrees, variant, **changes).startswith(f"UnsupportedError: {expected}")
    require_fit(recipe(**changes), Degrees(data=2), config(variant))


def test_a_recipe_for_one_process_needs_no_model() -> None:
    assert check_parallel(recipe()) == Degrees()


def test_a_recipe_is_checked_with_its_own_model(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    of_model = {"path": str(tmp_path)}
    assert check_parallel(recipe(model=of_model, parallel={"nproc": 4, "tensor": 2})) == Degrees(data=2, tensor=2)
    with pytest.raises(RecipeError, match=r"^parallel.pipeline: got 4"):
        check_parallel(recipe(model=of_model, parallel={"nproc": 4, "pipeline": 4}))
    with pytest.raises(UnsupportedError, match=r"^model.quantization: nf4"):
        check_parallel(recipe(model=of_model | {"quantization": "nf4"}, parallel={"nproc": 2, "shard": 2}))


@pytest.mark.skipif(not REAL, reason="NEMOTUNE_TEST_DATA is not set")
@pytest.mark.parametrize("name", [name for name in builtin_names() if name != "quickstart"])
def test_built_in_recipes_fit_their_models(name: str) -> None:
    asked = load(name)
    configs = json.loads((Path(str(REAL)) / "data/nemotron/configs/known_config_values.json").read_text())
    require_fit(asked, Degrees.of(asked.parallel), parse_config(configs[asked.model.path.replace("-Base", "")]["config"]))
