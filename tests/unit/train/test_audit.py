"""Before step 1 a run finds what is not held in the promised precision, whoever changed it, and says by name what it is."""

from __future__ import annotations

import io
import re
import sys
from functools import partial

import pytest
import torch
from random_models import make
from rich.console import Console
from torch import nn
from toy_loop import interrupted_at

from nemotune.distributed import World, arrange
from nemotune.errors import TrainingError
from nemotune.lora import apply_lora
from nemotune.models import load_model, parse_config
from nemotune.models.nemotron_h import Router
from nemotune.ops import experts
from nemotune.recipe import load
from nemotune.recipe.degrees import Degrees
from nemotune.train import run
from nemotune.train.optim import make_optimizer
from nemotune.train.precision import _narrow_product, audit_precision

ROUTER = "backbone.layers.1.mixer.gate"


def audit(model, *settings, optimizer=None):
    recipe = load("quickstart", settings)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return audit_precision(model, optimizer or make_optimizer(trained, load("quickstart").train), recipe)


@pytest.fixture
def adapted(hybrid_dir):
    model = load_model(hybrid_dir, dtype="bfloat16")
    apply_lora(model, load("quickstart", ["lora.rank=2"]).lora)
    return model


def test_an_adapted_model_is_as_promised_and_says_so(adapted):
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    narrow = sum(p.numel() for p in adapted.parameters() if p.dtype == torch.bfloat16)
    wide = sum(p.numel() for name, p in adapted.named_parameters() if name.endswith(("A_log", ".D", "dt_bias")))
    assert audit(adapted) == (
        f"precision: {trained:,} trained in fp32; {narrow:,} frozen in bfloat16; {wide:,} frozen in float32; "
        "A_log, D, dt_bias, e_score_correction_bias in fp32; routers compute in fp32 and are frozen; moments in fp32"
    )


def test_a_part_of_a_model_is_called_one(hybrid_dir):
    for degrees in (Degrees(tensor=2), Degrees(pipeline=2), Degrees(data=2, expert=2)):
        model = load_model(hybrid_dir, arrange=partial(arrange, world=World(degrees)))
        apply_lora(model, load("quickstart", ["lora.rank=2"]).lora)
        assert audit(model).startswith("precision of the part that the first process holds: ")


def test_four_bit_weights_are_counted(hybrid_dir):
    model = load_model(hybrid_dir, dtype="bfloat16", quantization="nf4")
    apply_lora(model, load("quickstart", ["lora.rank=2"]).lora)
    assert re.search(r"; [\d,]+ frozen in nf4; ", audit(model))


def test_all_weights_and_a_family_without_experts_pass(hybrid_dir, tmp_path):
    full = load_model(hybrid_dir, dtype="bfloat16", trainable=True)
    settings = "method=full", "export.merged=false"
    assert "frozen in" not in audit(full, *settings) and "routers compute in fp32 and are trained" in audit(full, *settings)
    make("llama").save_pretrained(tmp_path / "hf")
    llama = load_model(tmp_path / "hf", dtype="float32", trainable=True)
    assert audit(llama, *settings) == f"precision: {sum(p.numel() for p in llama.parameters()):,} trained in fp32; moments in fp32"


def narrowed(name):
    def change(model):
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if last in module._buffers:
            module._buffers[last] = module._buffers[last].bfloat16()
        else:
            held = getattr(module, last)
            setattr(module, last, nn.Parameter(held.detach().bfloat16(), requires_grad=held.requires_grad))

    return change


def narrow_product(model):
    router = model.get_submodule(ROUTER)
    forward = router.forward

    def in_bf16(x_TD):
        routing = forward(x_TD)
        return type(routing)(routing.experts_TK, routing.weights_TK.bfloat16())

    router.forward = in_bf16


def trained_router(model):
    model.get_submodule(ROUTER).weight = nn.Parameter(model.get_submodule(ROUTER).weight.detach().float())


def trained_bias(model):
    model.get_submodule(ROUTER).e_score_correction_bias.requires_grad_()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (narrowed("backbone.layers.2.mixer.q_proj.lora_A"), "backbone.layers.2.mixer.q_proj.lora_A: trained in bfloat16, expected float32"),
        (narrowed("backbone.layers.0.mixer.A_log"), "backbone.layers.0.mixer.A_log: held in bfloat16, expected float32"),
        (narrowed("backbone.layers.0.mixer.D"), "backbone.layers.0.mixer.D: held in bfloat16, expected float32"),
        (narrowed("backbone.layers.0.mixer.dt_bias"), "backbone.layers.0.mixer.dt_bias: held in bfloat16, expected float32"),
        (narrowed(f"{ROUTER}.e_score_correction_bias"), f"{ROUTER}.e_score_correction_bias: held in bfloat16, expected float32"),
        (narrow_product, f"{ROUTER}: computes in bfloat16, expected float32"),
        (trained_router, f"{ROUTER}.weight: trained, expected frozen under LoRA"),
        (trained_bias, f"{ROUTER}.e_score_correction_bias: has a gradient, expected frozen"),
    ],
)  # fmt: skip
def test_each_violation_stops_the_run_by_name(adapted, change, told):
    change(adapted)
    with pytest.raises(TrainingError) as caught:
        audit(adapted)
    assert [line.strip().partition(" (")[0] for line in str(caught.value).splitlines()[1:-1]] == [told]


ROUTERS = ("hybrid", "latent", "grouped_router", "unnormalised_router")


@pytest.mark.parametrize("variant", ROUTERS)
@pytest.mark.parametrize("dtype, full", [("bfloat16", False), ("bfloat16", True), ("float32", False)])
def test_a_router_whose_product_is_bf16_is_found_although_its_scores_are_fp32(variant, dtype, full, tmp_path, monkeypatch):
    make(variant).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=dtype, trainable=full)
    settings = ("method=full", "export.merged=false") if full else ()
    if not full:
        apply_lora(model, load("quickstart", ["lora.rank=2"]).lora)
    audit(model, *settings)
    linear = experts.F.linear
    monkeypatch.setattr(experts.F, "linear", lambda x, weight: linear(x.bfloat16(), weight.bfloat16()).float())
    with pytest.raises(TrainingError) as caught:
        audit(model, *settings)
    told = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    routers = [name for name, module in model.named_modules() if isinstance(module, Router)]
    assert len(told) == len(routers) > 0
    assert all(
        re.fullmatch(rf"{name}: scores are \d\.\de-0[34] off .*, expected float32", line) for name, line in zip(routers, told, strict=True)
    )


@pytest.mark.parametrize("width, num_experts", [(2688, 128), (4096, 512)])
def test_a_router_of_published_width_passes(width, num_experts):
    """The widest sums: Nemotron 3 Nano and Super."""
    config = parse_config({
        "model_type": "nemotron_h", "vocab_size": 8, "hidden_size": width, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "hybrid_override_pattern": "E", "n_routed_experts": num_experts, "num_experts_per_tok": 6, "moe_intermediate_size": 8,
        "moe_shared_expert_intermediate_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2,
    })  # fmt: skip
    router = Router(config)
    for dtype in (torch.bfloat16, torch.float32):
        torch.nn.init.normal_(router.weight, std=0.02, generator=torch.Generator().manual_seed(1))
        router.to(dtype).e_score_correction_bias.zero_()
        assert list(_narrow_product(router, dtype)) == []


def test_autocast_around_the_run_is_found(adapted):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TrainingError, match=rf"{ROUTER}: computes in bfloat16, expected float32"):
        audit(adapted)


class AdamW8bit(torch.optim.AdamW):
    pass


def test_the_optimiser_holds_what_is_trained_with_the_moments_asked_for(adapted):
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    (first, parameter), *others = trained.items()
    train = load("quickstart").train

    def problems(optimizer, *settings):
        with pytest.raises(TrainingError) as caught:
            audit(adapted, *settings, optimizer=optimizer)
        return [line.strip() for line in str(caught.value).splitlines()[1:-1]]

    assert problems(make_optimizer(dict(others), train)) == [f"{first}: not once among the optimiser's parameters"]
    frozen = "backbone.embeddings.weight"
    assert problems(make_optimizer({**trained, frozen: adapted.get_parameter(frozen)}, train)) == [
        f"{frozen}: frozen, and among the optimiser's parameters"
    ]
    assert problems(make_optimizer({**trained, "gone": nn.Parameter(torch.zeros(2))}, train)) == [
        "train.optimizer: 1 of the optimiser's tensors are not the model's"
    ]
    narrow = make_optimizer(trained, train)
    narrow.state[parameter] = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.bfloat16)}
    assert problems(narrow) == [f"{first}: exp_avg_sq is held in bfloat16, expected float32 for train.optimizer: adamw"]
    small = AdamW8bit(trained.values())
    assert problems(small) == [f"train.optimizer: the optimiser is {__name__}.AdamW8bit, expected adamw"]
    assert problems(make_optimizer(trained, train), "train.optimizer=adamw_8bit")[0].endswith("AdamW, expected adamw_8bit")
    assert audit(adapted, "train.optimizer=adamw_8bit", optimizer=small).endswith("; moments in 8 bits")


def test_a_run_prints_the_audit_and_is_stopped_by_it_before_its_first_step(train, tmp_path):
    told = io.StringIO()
    train("train.max_steps=1", console=Console(file=told))
    assert "precision: " in told.getvalue() and " trained in fp32; " in told.getvalue()
    assert "kernels: ssd=torch conv=torch experts=per_expert attention=per_document loss=chunked\n" in told.getvalue()
    with pytest.raises(TrainingError, match=r"A_log: held in bfloat16"):
        train("train.max_steps=1", name="narrow", doctor=narrowed("backbone.layers.0.mixer.A_log"))
    assert not (tmp_path / "narrow" / "metrics.jsonl").exists()


def test_a_resumed_run_is_audited_with_the_moments_it_loaded(train, monkeypatch):
    """The audit comes after the checkpoint is read: before it, the optimiser has no moments to look at."""
    with pytest.raises(KeyboardInterrupt):
        train("train.max_steps=3", "train.checkpoint_every=1", doctor=interrupted_at(2))
    seen = []
    monkeypatch.setattr(
        sys.modules[run.__module__], "audit_precision", lambda model, optimizer, recipe: seen.append(len(optimizer.state)) or ""
    )
    train("train.max_steps=3", resume=True)
    assert seen[0] > 0
