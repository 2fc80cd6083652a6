"""What weight decay takes and what it spares, by name, and AdamW's numbers."""

from __future__ import annotations

import pytest
import torch
from random_models import make

from nemotune.lora import apply_lora
from nemotune.models import load_model
from nemotune.recipe import Lora, Train
from nemotune.train.optim import make_optimizer
from nemotune.train.step import update

SPARED = ("norm.weight", "layernorm.weight", "norm_f.weight", ".A_log", ".D", ".dt_bias", "conv1d.weight", ".bias", "lora_magnitude_vector")
ALL = ("attention", "mamba", "mlp", "shared_experts", "experts", "latent", "embeddings", "lm_head")
LAST = {  # the last part of every name that a model of the variant trains: what is decayed
    "hybrid": {"embeddings.weight", "lm_head.weight", "gate.weight", "in_proj.weight", "out_proj.weight", "up_proj.weight", "down_proj.weight",
               "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"},
    "llama_biased": {"embed_tokens.weight", "lm_head.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight", "q_proj.weight",
                     "k_proj.weight", "v_proj.weight", "o_proj.weight"},
}  # fmt: skip


def decays(model, **settings):
    """The weight decay of each trained parameter."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(trained, Train(weight_decay=0.1, **settings))
    names = {id(p): name for name, p in trained.items()}
    found = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == trained.keys()
    return found


@pytest.mark.parametrize("variant", ["hybrid", "llama_biased"])
def test_matrices_are_decayed_and_nothing_else(tmp_path, variant):
    make(variant).save_pretrained(tmp_path)
    found = decays(load_model(tmp_path, dtype="float32", trainable=True))
    assert {".".join(name.split(".")[-2:]) for name, value in found.items() if value == 0.1} == LAST[variant]
    assert {value for name, value in found.items() if name.endswith(SPARED)} == {0.0}
    assert all(name.endswith(SPARED) for name, value in found.items() if value == 0.0)
    assert not any("correction_bias" in name for name in found)


@pytest.mark.parametrize("dora, targets", [(False, ALL[:5] + ALL[6:]), (True, ("attention", "mamba", "mlp", "lm_head"))])
def test_both_factors_of_adapters_are_decayed_and_magnitudes_are_not(hybrid_dir, dora, targets):
    model = load_model(hybrid_dir, dtype="float32")
    apply_lora(model, Lora(rank=2, targets=targets, dora=dora))
    factors = {"lora_A", "lora_B", *({"lora_magnitude_vector"} if dora else {"lora_embedding_A", "lora_embedding_B"})}
    found = decays(model)
    assert {name.rpartition(".")[2] for name in found} == factors
    assert all(value == (0.0 if name.endswith("magnitude_vector") else 0.1) for name, value in found.items())


def test_decay_is_decoupled_and_eps_and_betas_are_the_recipes():
    """Two steps, in numbers: m and v are corrected for their beginning, and decay acts on the weight alone (arXiv 1711.05101, algorithm 2)."""
    start, gradients = (
        torch.tensor([[2.0, -3.0]], dtype=torch.float64),
        [torch.tensor([[1e-3, -4e-3]], dtype=torch.float64), torch.tensor([[2e-3, 0.0]], dtype=torch.float64)],
    )
    rate, decay, eps, first, second = 0.01, 0.1, 1e-3, 0.8, 0.95
    p = torch.nn.Parameter(start.float())
    optimizer = make_optimizer({"weight": p}, Train(weight_decay=decay, betas=(first, second), eps=eps))
    m = v = torch.zeros_like(start)
    expected = start
    for number, gradient in enumerate(gradients, start=1):
        p.grad = gradient.float()
        update([p], optimizer, learning_rate=rate, grad_norm=1.0, max_grad_norm=0.0)
        m, v = first * m + (1 - first) * gradient, second * v + (1 - second) * gradient**2
        step = (m / (1 - first**number)) / ((v / (1 - second**number)).sqrt() + eps)
        expected = expected - rate * decay * expected - rate * step
    assert torch.allclose(p.detach().double(), expected, rtol=1e-6, atol=0)
