"""Every rank's part of a model: together they are the whole, each has what its heads and groups need, and what they compute adds up."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from random_models import make

from nemotune.distributed import World, arrange
from nemotune.distributed.regions import regions
from nemotune.models import build_model, load_model, parse_config
from nemotune.models.disk_names import tensors_of
from nemotune.ops.documents import Documents
from nemotune.recipe.degrees import Degrees
from nemotune.weights import Checkpoint

CHANGES = {"wide_heads": dict(num_attention_heads=6, num_key_value_heads=3)}
CASES = [("hybrid", 2), ("four_ways", 4), ("wide_heads", 3), ("llama", 2), ("llama", 4), ("llama_tied", 2)]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for variant in {variant for variant, _ in CASES}:
        make(variant, **CHANGES.get(variant, {})).save_pretrained(path / variant)
    return path


def worlds(degree: int) -> list[World]:
    return [World(Degrees(tensor=degree), rank=rank) for rank in range(degree)]


def loaded(directory, degree: int):
    """The whole model, and each rank's part of it."""
    return load_model(directory, dtype="float32"), [
        load_model(directory, dtype="float32", arrange=partial(arrange, world=world)) for world in worlds(degree)
    ]


def empty(variant: str, world: World):
    model = build_model(parse_config(make(variant).config.to_dict()))
    arrange(model, world)
    return model


@pytest.mark.parametrize(("variant", "degree"), CASES)
def test_the_parts_together_are_the_whole(directories, variant, degree):
    whole, ranks = loaded(directories / variant, degree)
    for name, expected in tensors_of(whole).items():
        together = torch.full_like(expected, torch.nan)
        for rank in ranks:
            part = tensors_of(rank)[name]
            layout = rank.layout(name, part)
            assert layout.shape == expected.shape and layout.local_shape == part.shape, name
            layout.put(part, together)
        assert torch.equal(together, expected), name
    assert all((rank.lm_head.weight is rank.embeddings.weight) == whole.config.tie_word_embeddings for rank in ranks)


@pytest.mark.parametrize(("variant", "degree"), CASES)
def test_matrices_are_held_once_but_for_shared_heads_the_router_and_latent_projections(directories, variant, degree):
    whole, ranks = loaded(directories / variant, degree)
    for name, tensor in tensors_of(whole).items():
        copies = sum(tensors_of(rank)[name].numel() for rank in ranks) / tensor.numel()
        if ".gate." in name or "latent" in name or (name.endswith("norm.weight") and ".mixer." not in name):
            assert copies == degree, name
        elif ".k_proj." in name or ".v_proj." in name:
            assert copies == max(1, degree / whole.config.num_key_value_heads), name
        elif tensor.ndim > 1:
            assert copies == 1, name


@pytest.mark.parametrize(("variant", "degree"), CASES)
def test_what_the_ranks_make_of_a_region_adds_up(directories, variant, degree):
    """Outputs, and gradients of the input: the model's code runs unchanged on each rank's heads, groups and widths."""
    whole, ranks = loaded(directories / variant, degree)
    x_TD = torch.randn(12, whole.config.hidden_size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mixers = [name for name in regions(whole) if name != "lm_head"]
    assert len(mixers) == whole.config.num_layers * (2 if whole.family == "llama" else 1)
    for name in mixers:
        outputs = [run_region(model, name, x_TD) for model in (whole, *ranks)]
        slope_TD = outputs[0].detach().cos()
        for expected, *parts in (outputs, [torch.autograd.grad(y_TD, x_TD, slope_TD)[0] for y_TD in outputs]):
            largest = expected.abs().max()
            assert all((part - expected).abs().max() > 0.01 * largest for part in parts), f"{name}: a part that is the whole shows nothing"
            assert (sum(parts) - expected).abs().max() <= 2e-6 * largest, name


def run_region(model, name: str, x_TD):
    documents = Documents(torch.tensor([0, 5, 12], dtype=torch.int32))
    block, mixer = (model.get_submodule(part) for part in (name.rpartition(".")[0], name))
    if name.endswith("self_attn"):
        return mixer(x_TD, documents, model.rope(documents.positions_T))
    return mixer(x_TD, documents) if getattr(block, "block_type", "mlp") in ("mamba", "attention") else mixer(x_TD)


def test_ranks_share_key_value_heads_with_those_whose_queries_do():
    layouts = [empty("llama", world).layouts for world in worlds(4)]
    held = {which: [of_rank[f"model.layers.0.self_attn.{which}_proj.weight"].ranges[0] for of_rank in layouts] for which in "qkv"}
    assert held["k"] == held["v"] == [((0, 16),), ((0, 16),), ((16, 32),), ((16, 32),)]
    assert held["q"] == [((0, 16),), ((16, 32),), ((32, 48),), ((48, 64),)]


def test_experts_that_others_divide_keep_their_width():
    model = empty("hybrid", World(Degrees(data=2, tensor=2, expert=2), rank=1))
    assert model.get_parameter("backbone.layers.1.mixer.experts.up_proj.weight").shape[1:] == (24, 32)
    assert model.get_parameter("backbone.layers.1.mixer.shared_experts.up_proj.weight").shape == (20, 32)


def test_of_what_is_split_by_rows_no_other_rows_are_read(directories, monkeypatch):
    num_bytes, read = {}, Checkpoint._values

    def counted(self, info, first, size):
        num_bytes[info.name] = num_bytes.get(info.name, 0) + size
        return read(self, info, first, size)

    monkeypatch.setattr(Checkpoint, "_values", counted)
    model = load_model(directories / "hybrid", arrange=partial(arrange, world=worlds(2)[1]))
    for part in ("embeddings", "lm_head", "0.mixer.in_proj", "2.mixer.q_proj", "3.mixer.up_proj", "experts.5.up_proj"):
        halves = [name for name in num_bytes if name.endswith(f"{part}.weight")]
        assert halves and all(num_bytes[name] == model.source.tensors[name].num_bytes // 2 for name in halves), part
