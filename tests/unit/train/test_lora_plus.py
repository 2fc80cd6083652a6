"""LoRA+: the B of each adapter learns at a multiple of the rate of its A, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from random_models import make
from toy_loop import interrupted_at

from nemotune.lora import apply_lora, lora_modules
from nemotune.models import load_model
from nemotune.recipe import Lora, Train
from nemotune.train.optim import make_optimizer
from nemotune.train.step import update


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def adapters(hybrid_dir):
    """Those of a hybrid with experts, by name."""
    model = load_model(hybrid_dir, dtype="float32")
    apply_lora(model, Lora(rank=2))
    return trained(model)


def rates(optimizer, parameters):
    names = {id(p): name for name, p in parameters.items()}
    return {names[id(p)]: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}


def test_b_has_the_ratio_and_every_other_parameter_the_rate(adapters):
    found = rates(make_optimizer(adapters, Train(learning_rate=0.01), plus_ratio=16), adapters)
    assert found == {name: pytest.approx(0.16 if name.endswith("lora_B") else 0.01) for name in adapters}
    assert set(rates(make_optimizer(adapters, Train(learning_rate=0.01)), adapters).values()) == {0.01}


def test_a_and_b_are_decayed_alike(adapters):
    optimizer = make_optimizer(adapters, Train(learning_rate=0.01, weight_decay=0.1), plus_ratio=16)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]


def test_full_tuning_has_one_rate_whatever_the_ratio(tmp_path):
    make("llama").save_pretrained(tmp_path)
    parameters = trained(load_model(tmp_path, dtype="float32", trainable=True))
    assert set(rates(make_optimizer(parameters, Train(learning_rate=0.01), plus_ratio=16), parameters).values()) == {0.01}


@pytest.mark.parametrize("rate", [0.01, 0.002])
def test_a_first_step_moves_b_the_ratio_times_as_far(adapters, rate):
    """Adam's first step is rate x sign(gradient), but for eps 1e-8 beside gradients of 1; the schedule's rate scales both."""
    before = {name: p.detach().clone() for name, p in adapters.items()}
    optimizer = make_optimizer(adapters, Train(learning_rate=0.01), plus_ratio=8)
    for p in adapters.values():
        p.grad = torch.ones_like(p)
    update(adapters.values(), optimizer, learning_rate=rate, grad_norm=1.0, max_grad_norm=0.0)
    for name, p in adapters.items():
        moved = before[name] - p.detach()
        torch.testing.assert_close(moved, torch.full_like(moved, rate * (8 if name.endswith("lora_B") else 1)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("change", ["lora.plus_ratio=4", "lora.dora=true"])
def test_a_resumed_run_equals_an_uninterrupted_one(train, change):
    settings = (change, "lora.targets=[attention, in_proj]", "train.schedule=cosine", "train.max_steps=4", "train.checkpoint_every=2")
    whole, _ = train(*settings, name="whole")
    with pytest.raises(KeyboardInterrupt):
        train(*settings, name="cut", doctor=interrupted_at(4))
    resumed, _ = train(*settings, name="cut", resume=True)
    plain, _ = train(*settings[1:], name="plain")
    for (name, one), (_, other), (_, third) in zip(lora_modules(whole), lora_modules(resumed), lora_modules(plain), strict=True):
        assert all(torch.equal(*both) for both in zip(one.parameters(recurse=False), other.parameters(recurse=False), strict=True)), name
        assert not torch.equal(one.lora_B, third.lora_B), name
