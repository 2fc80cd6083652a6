"""Which layers a stage gets, and what survives of the rest of the model around them."""

from __future__ import annotations

import io
from functools import partial
from itertools import combinations, pairwise

import pytest
import torch
from random_models import make
from rich.console import Console

from nemotune.distributed import World, arrange
from nemotune.distributed.stages import describe_stages, split, stages_of
from nemotune.errors import RecipeError
from nemotune.lora import apply_lora, lora_modules
from nemotune.models import build_model, load_model, locate, read_config
from nemotune.models.layers import Elsewhere
from nemotune.recipe import Lora, Train, load
from nemotune.recipe.degrees import Degrees
from nemotune.train.activation import set_activation_checkpointing
from nemotune.train.flops import Flops
from nemotune.train.optim import make_optimizer
from nemotune.train.step import update
from nemotune.workflow.training import plan


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for variant in ("hybrid", "llama_tied"):
        make(variant).save_pretrained(root / variant)
    return root


def stage(directory, index, stages=2, **options):
    world = World(Degrees(pipeline=stages), rank=index)
    return load_model(directory, dtype="float32", arrange=partial(arrange, world=world), **options)


@pytest.mark.parametrize("work", [[5, 1, 1, 1, 9, 2, 7], [1] * 7, [1, 1, 1, 1, 1, 1, 100]])
@pytest.mark.parametrize("stages", [1, 2, 3, 7])
def test_no_split_of_whole_layers_has_less_work_in_its_heaviest_stage(work, stages):
    found = split(work, stages)
    assert [layer for layers in found for layer in layers] == list(range(7)) and all(found) and len(found) == stages
    most = max(sum(work[layer] for layer in layers) for layers in found)
    borders = [(0, *inner, 7) for inner in combinations(range(1, 7), stages - 1)]
    assert most == min(max(sum(work[a:b]) for a, b in pairwise(each)) for each in borders)


def test_of_splits_with_the_same_heaviest_stage_an_even_one_is_taken():
    assert split([1, 1, 1, 1, 100], 3) == [range(2), range(2, 4), range(4, 5)]


def test_the_head_counts_and_experts_as_far_as_a_token_meets_them(directories):
    config = load_model(directories / "hybrid", dtype="float32").config
    model = build_model(config)
    mamba, experts, attention, mlp, *_ = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    unmet = (config.n_routed_experts - config.num_experts_per_tok) * 2 * config.hidden_size * config.moe_intermediate_size
    work = [mamba, experts - unmet, attention, mlp, mamba, experts - unmet + config.vocab_size * config.hidden_size]
    assert stages_of(model, 2) == split(work, 2) == [range(3), range(3, 6)]
    share = sum(work[:3]) / sum(work)
    assert describe_stages(config, 2) == (
        f"pipeline stage 1 of 2: embeddings, layers 0-2; {share:.1%} of the work\n"
        f"pipeline stage 2 of 2: layers 3-5, head; {1 - share:.1%} of the work"
    )


def test_stages_hold_the_model_between_them_and_only_a_tied_tensor_twice(directories):
    for variant, shared in (("hybrid", set()), ("llama_tied", {"model.embed_tokens.weight"})):
        whole = dict(load_model(directories / variant, dtype="float32").named_parameters())
        held = [dict(stage(directories / variant, index, 3).named_parameters()) for index in range(3)]
        assert {name for of_stage in held for name in of_stage} == whole.keys()
        twice = [name for name in whole if sum(name in of_stage for of_stage in held) > 1]
        assert set(twice) == shared and all(shared <= held[index].keys() for index in (0, 2))
        assert all(torch.equal(value, whole[name]) for of_stage in held for name, value in of_stage.items())


def test_what_stands_elsewhere_hands_on_what_it_is_given(directories):
    """The stages one after the other are the model."""
    whole, documents = load_model(directories / "llama_tied", dtype="float32"), torch.tensor([0, 3, 7], dtype=torch.int32)
    x = tokens = torch.arange(7)
    for index in range(3):
        x = stage(directories / "llama_tied", index, 3)(x, documents)
    assert torch.equal(x, whole(tokens, documents))


def test_targets_are_judged_over_the_whole_model(directories):
    reached = [dict(lora_modules(adapted(stage(directories / "hybrid", index), ("attention", "lm_head")))) for index in range(2)]
    whole = dict(lora_modules(adapted(load_model(directories / "hybrid", dtype="float32"), ("attention", "lm_head"))))
    assert reached[0].keys() | reached[1].keys() == whole.keys() and not reached[0].keys() & reached[1].keys()
    assert all(torch.equal(layer.lora_A, whole[name].lora_A) for of_stage in reached for name, layer in of_stage.items())
    with pytest.raises(RecipeError, match="'latent' matches no module of nemotron_h"):
        adapted(stage(directories / "hybrid", 0), ("latent",))


def test_operations_of_the_stages_add_up(directories):
    whole = Flops.of(adapted(load_model(directories / "hybrid", dtype="float32"), "default"))
    parts = [Flops.of(adapted(stage(directories / "hybrid", index), "default")) for index in range(2)]
    for name, value in vars(whole).items():
        assert sum(getattr(part, name) for part in parts) == value, name


def test_experts_are_offloaded_where_there_are_some(directories):
    """The second of six stages has an expert layer, the first has none."""
    for index, has_experts in ((0, False), (1, True)):
        model = stage(directories / "hybrid", index, 6, offload="experts")
        assert any(getattr(module, "lent", None) for module in model.modules()) == has_experts
        assert sum(isinstance(block, Elsewhere) for block in model.blocks) == 5


def test_nothing_is_kept_for_blocks_that_are_elsewhere(directories):
    model, kept = stage(directories / "hybrid", 0), []
    set_activation_checkpointing(model, "full")
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda value: value):
        model.run_block(Elsewhere(), torch.ones(3, 32, requires_grad=True), None, None, None)
    assert not kept


def test_a_quantised_stage_is_the_quantised_models(directories):
    held = [dict(stage(directories / "hybrid", index, 3, quantization="nf4").named_buffers()) for index in range(3)]
    whole = dict(load_model(directories / "hybrid", dtype="float32", quantization="nf4").named_buffers())
    assert {name for of_stage in held for name in of_stage} == whole.keys()
    assert all(torch.equal(value, whole[name]) for of_stage in held for name, value in of_stage.items())


def test_a_stage_that_trains_nothing_takes_its_steps():
    optimizer = make_optimizer({}, Train())
    update([], optimizer, learning_rate=1e-3, grad_norm=2.0, max_grad_norm=1.0)
    assert [group["params"] for group in optimizer.param_groups] == [[]]


def test_a_plan_tells_the_stages():
    console = Console(file=io.StringIO(), width=200)
    plan(load("quickstart", ["parallel.nproc=2", "parallel.pipeline=2"]), console=console)
    told = describe_stages(read_config(locate(load("quickstart").model.path)), 2)
    assert told in console.file.getvalue() and "stage 2 of 2: layers 4-5, head;" in told


def adapted(model, targets):
    apply_lora(model, Lora(rank=4, alpha=8, targets=targets))
    return model
