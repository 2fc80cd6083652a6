"""A model of NF4 weights is the model of the values that they stand for."""

from __future__ import annotations

import pytest
import random_models
import torch

from nemotune.lora import apply_lora, lora_modules
from nemotune.lora.targets import adaptable_modules
from nemotune.models import load_model
from nemotune.models.layers import GroupedLinear, Linear
from nemotune.models.quantize import NF4GroupedLinear, NF4Linear
from nemotune.ops import nf4
from nemotune.recipe import Lora

VARIANTS = ["hybrid", "latent", "llama", "llama_biased"]
TOKENS, BORDERS = torch.arange(20) % 96, torch.tensor([0, 7, 20], dtype=torch.int32)


@pytest.fixture(scope="module", params=VARIANTS)
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    random_models.make(request.param).save_pretrained(path)
    return path


def widened(directory):
    """The wide model whose weights are those that NF4 stands for."""
    model = load_model(directory, dtype="float32")
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, Linear | GroupedLinear) or module is model.lm_head:
                continue
            for weight in module.weight if isinstance(module, GroupedLinear) else [module.weight]:
                weight.copy_(nf4.dequantize(nf4.quantize(weight), tuple(weight.shape), torch.float32))
    return model


def test_hidden_states_are_those_of_the_widened_weights(directory):
    quantized = load_model(directory, dtype="float32", quantization="nf4")
    with torch.no_grad():
        assert torch.equal(quantized(TOKENS, BORDERS), widened(directory)(TOKENS, BORDERS))


def test_adapters_get_the_gradient_of_the_widened_weights(directory):
    gradients = []
    for model in (load_model(directory, dtype="float32", quantization="nf4"), widened(directory)):
        apply_lora(model, Lora(rank=8, targets="default"))
        for _, layer in lora_modules(model):
            torch.nn.init.normal_(layer.lora_B, std=0.02, generator=torch.Generator().manual_seed(1))
        model(TOKENS, BORDERS).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    quantized, wide = gradients
    assert quantized.keys() == wide.keys()
    for name, expected in wide.items():
        assert (quantized[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_adapters_over_four_bits_are_alive_out_proj_and_experts_included(directory):
    model = load_model(directory, quantization="nf4")
    targets = {"attention", "mamba", "mlp", "shared_experts", "experts", "latent"} & set(adaptable_modules(model).values())
    apply_lora(model, Lora(rank=8, targets=tuple(sorted(targets))))
    model(TOKENS, BORDERS).float().square().sum().backward()
    adapted = dict(lora_modules(model))
    assert any(name.endswith("out_proj") for name in adapted) or model.family == "llama"
    assert [name for name, layer in adapted.items() if not layer.lora_B.grad.abs().sum() > 0] == []


def test_every_linear_layer_of_the_blocks_and_every_expert_is_quantised(directory):
    wide, quantized = load_model(directory), load_model(directory, quantization="nf4")
    for name, module in wide.named_modules():
        if isinstance(module, Linear | GroupedLinear) and module is not wide.lm_head:
            form = NF4GroupedLinear if isinstance(module, GroupedLinear) else NF4Linear
            assert isinstance(quantized.get_submodule(name), form), name
    assert not isinstance(quantized.lm_head, NF4Linear)
    kept = {name for name, _ in quantized.named_parameters()} | {name for name, _ in quantized.named_buffers() if ".nf4_" not in name}
    assert {name for name in kept if name.endswith(("gate.weight", "A_log", "conv1d.weight", "correction_bias"))} == {
        name for name in wide.state_dict() if name.endswith(("mixer.gate.weight", "A_log", "conv1d.weight", "correction_bias"))
    }


def test_a_quantised_model_is_not_saved(directory, tmp_path):
    from nemotune.models import save_model

    with pytest.raises(AssertionError, match="never saved"):
        save_model(load_model(directory, quantization="nf4"), tmp_path / "out")
