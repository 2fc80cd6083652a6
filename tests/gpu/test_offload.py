"""Experts and activations in host memory, on the GPU that they are spared: the same results in less memory."""

from __future__ import annotations

import pytest
import torch
from random_models import NEMOTRON
from transformers import NemotronHConfig

from nemotune.lora import apply_lora, lora_modules
from nemotune.models import load_model, save_model
from nemotune.recipe import Lora
from nemotune.train.activation import set_activation_checkpointing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WIDE = dict(hybrid_override_pattern="EM*EE-E", num_hidden_layers=7, hidden_size=256, moe_intermediate_size=512, n_routed_experts=16)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    NemotronHConfig(**{**NEMOTRON, **WIDE}).save_pretrained(path)
    save_model(load_model(path, dtype="float32", random_seed=0), path / "weights")
    return path / "weights"


def steps(directory, *, offload, quantization, mode):
    """The losses and gradients of two steps, and what the device held after loading."""
    before = torch.cuda.memory_allocated()
    model = load_model(directory, device="cuda", quantization=quantization, offload=offload).train()
    held = torch.cuda.memory_allocated() - before
    apply_lora(model, Lora(rank=4, targets=("experts", "attention")))
    for _, layer in lora_modules(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    set_activation_checkpointing(model, mode)
    tokens, borders = torch.arange(90, device="cuda"), torch.tensor([0, 40, 90], dtype=torch.int32, device="cuda")
    for _ in range(2):
        loss = model.loss(model(tokens, borders), tokens)
        loss.backward()
    return held, [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("mode", ["none", "full", "offload"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_results_are_those_of_experts_on_the_device_in_less_memory(directory, quantization, mode):
    found = {}
    for offload in ("none", "experts"):
        torch.manual_seed(0)
        found[offload] = steps(directory, offload=offload, quantization=quantization, mode=mode)
    assert found["experts"][0] < 0.8 * found["none"][0]
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-4) for a, b in zip(found["experts"][1], found["none"][1], strict=True))
