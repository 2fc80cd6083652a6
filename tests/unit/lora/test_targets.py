"""LoRA reaches what the recipe says, and the table shows what that is."""

from __future__ import annotations

import re

import pytest
from random_models import make

from nemotune.errors import RecipeError, UnsupportedError
from nemotune.lora import apply_lora, coverage, lora_modules
from nemotune.models import load_model
from nemotune.recipe import Lora, load


def names(tmp_path, variant, targets):
    make(variant).save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf")
    apply_lora(model, Lora(rank=2, targets=targets))
    return {name.split("layers.")[-1] for name, _ in lora_modules(model)}


def test_default_reaches_every_linear_block_type_but_out_proj_and_the_head(tmp_path):
    assert names(tmp_path, "hybrid", "default") == {
        "0.mixer.in_proj", "3.mixer.up_proj", "3.mixer.down_proj", "4.mixer.in_proj",
        *(f"2.mixer.{p}_proj" for p in "qkvo"),
        *(f"{layer}.mixer.{owner}.{p}_proj" for layer in (1, 5) for owner in ("experts", "shared_experts") for p in ("up", "down")),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "published"),
    [
        ("glaive-nano-4b", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        ("fiqa-nano-8b", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ],
)
def test_built_in_recipes_reach_on_llama_what_was_published_and_on_a_hybrid_something(tmp_path, recipe, published):
    targets = load(recipe).lora.targets
    assert names(tmp_path / "a", "llama", targets) == names(tmp_path / "b", "llama", published)
    assert {name.split(".")[-1] for name in names(tmp_path / "c", "llama", targets)} == set(published)
    assert names(tmp_path / "d", "hybrid", targets)


def test_latent_projections_are_a_block_type(tmp_path):
    assert names(tmp_path, "latent", ("latent",)) == {f"{layer}.mixer.fc{i}_latent_proj" for layer in (1, 3) for i in (1, 2)}


def test_a_module_name_reaches_every_module_of_that_name(tmp_path):
    found = names(tmp_path, "hybrid", ("up_proj",))
    assert found == {"3.mixer.up_proj", *(f"{layer}.mixer.{owner}.up_proj" for layer in (1, 5) for owner in ("experts", "shared_experts"))}
    assert names(tmp_path / "b", "hybrid", ("layers.2.mixer.q_proj",)) == {"2.mixer.q_proj"}


def test_mamba_includes_out_proj_when_it_is_asked_for(tmp_path):
    assert names(tmp_path, "hybrid", ("mamba",)) == {"0.mixer.in_proj", "0.mixer.out_proj", "4.mixer.in_proj", "4.mixer.out_proj"}


@pytest.mark.parametrize("variant, target", [("hybrid", "gate_proj"), ("llama", "mamba"), ("hybrid", "gate"), ("hybrid", "roj")])
def test_a_target_that_matches_nothing_is_an_error(tmp_path, variant, target):
    with pytest.raises(RecipeError, match=f"lora.targets: '{target}' matches no module"):
        names(tmp_path, variant, ("attention", target))


def test_every_unmatched_target_is_told_with_a_suggestion(tmp_path):
    with pytest.raises(RecipeError, match=r"'q_porj'.*Did you mean 'q_proj'\?[\s\S]*'experst'.*Did you mean 'experts'\?"):
        names(tmp_path, "hybrid", ("q_porj", "experst"))


def test_coverage_counts_what_trains(hybrid_dir):
    model = load_model(hybrid_dir)
    base = sum(p.numel() for p in model.parameters())
    apply_lora(model, Lora(rank=2, targets=("experts", "q_proj")))
    table = coverage(model)
    assert table.base_parameters == base
    assert table.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = {row.block_type: (row.layers, row.modules, row.adapted) for row in table.rows}
    assert rows["experts"] == (2, 4, 4) and rows["attention"] == (1, 4, 1) and rows["mamba"] == (2, 4, 0)
    assert sum(row.parameters for row in table.rows) == table.parameters
    assert all(row.bytes == 4 * row.parameters for row in table.rows)


def test_the_router_is_never_trained(hybrid_dir):
    model = load_model(hybrid_dir, trainable=True)
    apply_lora(model, Lora(rank=2))
    routers = [(name, p) for name, p in model.named_parameters() if ".gate." in name]
    assert routers and not any(p.requires_grad for _, p in routers)
    assert all(name.endswith((".lora_A", ".lora_B")) for name, p in model.named_parameters() if p.requires_grad)
    assert not any(name.endswith("e_score_correction_bias") for name, _ in model.named_parameters())  # a buffer: no optimiser sees it


def settings(hybrid_dir, **patterns):
    """Rank and scale of every adapted module, and the table."""
    model = load_model(hybrid_dir)
    apply_lora(model, Lora(rank=2, alpha=4, targets=("attention", "mlp", "experts"), **patterns))
    return {
        name.split("layers.")[-1]: (layer.lora_A.shape[-2], layer.lora_B.shape[-1], layer.scale) for name, layer in lora_modules(model)
    }, coverage(model)


def test_patterns_give_their_modules_ranks_and_alphas(hybrid_dir):
    found, table = settings(
        hybrid_dir, rank_pattern={"q_proj": 8, "attention": 4, "experts.up_proj": 1}, alpha_pattern={"layers.3.mixer.up_proj": 6}
    )
    assert found["2.mixer.q_proj"] == (8, 8, 0.5) and found["2.mixer.k_proj"] == (4, 4, 1.0)
    assert found["1.mixer.experts.up_proj"] == (1, 1, 4.0) and found["1.mixer.experts.down_proj"] == (2, 2, 2.0)
    assert found["3.mixer.up_proj"] == (2, 2, 3.0) and found["3.mixer.down_proj"] == (2, 2, 2.0)
    rows = {row.block_type: row.parameters for row in table.rows}
    assert rows["attention"] == 8 * (32 + 32) + 4 * (2 * (32 + 16) + 32 + 32) and rows["mlp"] == 2 * 2 * (32 + 48)
    assert rows["experts"] == 2 * 6 * (1 + 2) * (32 + 24)


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_every_key_of_a_pattern_that_decides_nothing_is_told(hybrid_dir, pattern):
    with pytest.raises(RecipeError) as error:
        settings(hybrid_dir, **{pattern: {"atention": 8, "attention": 4, "q_proj": 8, "mamba": 2}})
    told = str(error.value).splitlines()
    assert told[0].startswith(
        f"lora.{pattern}: 'atention' matches no adapted module. Did you mean 'attention'? Known: attention, down_proj"
    )
    assert told[1].startswith(f"lora.{pattern}: 'q_proj' decides nothing") and "Put it before the more general one" in told[1]
    assert told[2].startswith(f"lora.{pattern}: 'mamba' matches no adapted module.") and len(told) == 3


def test_dora_on_experts_is_refused_in_one_sentence_with_what_to_use(hybrid_dir, tmp_path):
    with pytest.raises(
        UnsupportedError, match=r"^lora\.dora: DoRA is for linear layers, not for experts or embeddings; use lora\.targets=\[(.*)\], or"
    ) as error:
        apply_lora(load_model(hybrid_dir), Lora(rank=2, dora=True))
    told = tuple(re.search(r"\[(.*)\]", str(error.value))[1].split(", "))
    default = names(tmp_path, "hybrid", "default")
    assert names(tmp_path, "hybrid", told) == {name for name in default if ".experts." not in name}, "not Mamba's out_proj"
    apply_lora(load_model(hybrid_dir), Lora(rank=2, dora=True, targets=told))


def test_coverage_counts_magnitudes(hybrid_dir):
    model = load_model(hybrid_dir)
    base = sum(p.numel() for p in model.parameters())
    apply_lora(model, Lora(rank=2, dora=True, targets=("mlp",)))
    table = coverage(model)
    assert table.parameters == 2 * 2 * (32 + 48) + 48 + 32 == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert table.base_parameters == base
