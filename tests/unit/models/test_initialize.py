"""Fresh weights, kind by kind, have the distribution that megatron-core draws them from; the bounds are five standard errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from random_models import make

from nemotune.models import build_model, read_config
from nemotune.models.initialize import draw

N = 2**18
ZERO = {".e_score_correction_bias": 0.0, "proj.bias": 0.0}
ONE = {"norm.weight": 1.0, "norm_f.weight": 1.0, "layernorm.weight": 1.0, ".D": 1.0}
INTO_RESIDUAL = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2_latent_proj.weight")
OTHERS = (
    "embeddings.weight", "embed_tokens.weight", "lm_head.weight", "in_proj.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight",
    "up_proj.weight", "gate_proj.weight", "gate.weight", "fc1_latent_proj.weight",
)  # fmt: skip


def is_normal(values, std):
    """Mean, deviation and the fourth moment, whose standard errors are 1, 1 / sqrt(2) and sqrt(96) over sqrt(N) in units of the deviation."""
    z = values.double() / std
    assert abs(z.mean()) < 5 / math.sqrt(N)
    assert abs(z.std() - 1) < 5 / math.sqrt(2 * N)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / N)


def is_uniform(values, low, high):
    """Within its bounds, near both (all but 5 of N expected values at most), and with the mean and the deviation of the uniform."""
    z = (values.double() - low) / (high - low)
    assert -1e-6 <= z.min() < 20 / N and 1 - 20 / N < z.max() <= 1 + 1e-6
    assert abs(z.mean() - 0.5) < 5 * math.sqrt(1 / 12 / N)
    assert abs(z.std() - math.sqrt(1 / 12)) < 5 * math.sqrt(1 / 180 / N) / (2 * math.sqrt(1 / 12))


@pytest.fixture(scope="module", params=["hybrid", "latent", "llama_biased"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    made = make(request.param)
    made.config.initializer_range = 0.013
    made.config.rescale_prenorm_residual = True
    made.config.time_step_min, made.config.time_step_max = 0.002, 0.3
    made.save_pretrained(path)
    return build_model(read_config(path))


def test_every_tensor_has_its_distribution(model):
    blocks = len(model.blocks)
    additions = 2 * blocks if model.family == "llama" else blocks
    seen = set()
    for name in model.state_dict():
        values = draw(name, (N,), model, seed=7)
        assert values.dtype == torch.float32
        kind = next(
            kind
            for kind in (*ZERO, *ONE, *INTO_RESIDUAL, *OTHERS, ".A_log", ".dt_bias", "conv1d.weight", "conv1d.bias")
            if name.endswith(kind)
        )
        seen.add(kind)
        if kind in ZERO or kind in ONE:
            assert (values == {**ZERO, **ONE}[kind]).all(), name
        elif kind == ".A_log":
            is_uniform(values.exp(), 1, 16)
        elif kind == ".dt_bias":
            is_uniform(F.softplus(values.double()).log(), math.log(0.002), math.log(0.3))
        elif kind.startswith("conv1d"):
            is_uniform(values, -0.5, 0.5)  # four taps
        else:
            is_normal(values, 0.013 / math.sqrt(additions) if kind in INTO_RESIDUAL else 0.013)
    assert seen >= (
        {"embed_tokens.weight", "gate_proj.weight", "proj.bias"} if model.family == "llama" else {".A_log", ".dt_bias", "gate.weight"}
    )


def test_nothing_is_divided_where_the_config_does_not_rescale(tmp_path):
    made = make("hybrid")
    made.config.rescale_prenorm_residual = False
    made.save_pretrained(tmp_path)
    plain = build_model(read_config(tmp_path))
    is_normal(draw("backbone.layers.0.mixer.out_proj.weight", (N,), plain, seed=7), plain.config.initializer_range)


def test_tensors_are_drawn_apart(model):
    """No two of a model's normal tensors are multiples of each other."""
    names = [name for name in model.state_dict() if name.endswith((*INTO_RESIDUAL, *OTHERS))]
    ratios = {round((values[0] / values[1]).item(), 6) for values in (draw(name, (2,), model, seed=7) for name in names)}
    assert len(ratios) == len(names)
