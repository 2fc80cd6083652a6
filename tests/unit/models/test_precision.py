"""What has to stay fp32 in a bf16 model does, measured where it is used."""

from __future__ import annotations

import pytest
import torch
from random_models import make

from nemotune.models import llama, load_model
from nemotune.models.base import Head
from nemotune.ops.cross_entropy import linear_cross_entropy
from nemotune.ops.experts import Routing, dispatch, route
from nemotune.ops.rope import rope_frequencies


def scan_inputs(tmp_path, *, limits=None):
    """What the first Mamba layer of a bf16 model hands its scan, with in_proj zeroed so that dt comes from dt_bias alone."""
    theirs = make("hybrid")
    if limits:
        theirs.config.time_step_limit = limits
    theirs.save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf", dtype="bfloat16")
    mixer, seen = model.backbone.layers[0].mixer, {}
    with torch.no_grad():
        mixer.in_proj.weight.zero_()
    mixer.scan.register_forward_hook(lambda module, inputs, output: seen.update(dt=inputs[1], A=inputs[2], D=inputs[5]))
    model(torch.arange(5), torch.tensor([0, 5], dtype=torch.int32))
    return mixer, seen


def test_softplus_of_dt_and_the_decay_are_fp32(tmp_path):
    mixer, seen = scan_inputs(tmp_path)
    assert seen["dt"].dtype == seen["A"].dtype == seen["D"].dtype == torch.float32
    assert torch.equal(seen["dt"][0], torch.nn.functional.softplus(mixer.dt_bias))
    assert not torch.equal(mixer.dt_bias, mixer.dt_bias.bfloat16().float()), "a dt_bias that bf16 would round"
    assert torch.equal(seen["A"], -mixer.A_log.exp())


def test_dt_is_clamped_by_the_configs_limit(tmp_path):
    _, seen = scan_inputs(tmp_path, limits=(0.6, 0.65))
    assert seen["dt"].min() == torch.tensor(0.6) and seen["dt"].max() == torch.tensor(0.65)


def test_rotary_frequencies_are_fp32_after_a_cast_computed_once_and_no_part_of_the_state(tmp_path, monkeypatch):
    make("llama").save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf", dtype="float32")
    computed = []
    monkeypatch.setattr(llama, "rope_frequencies", lambda *settings: computed.append(settings) or rope_frequencies(*settings))
    tokens, borders, positions = torch.arange(5), torch.tensor([0, 5], dtype=torch.int32), torch.arange(5000, 5005)
    model(tokens, borders)
    before = model.rope(positions)
    model.to(torch.bfloat16).compute_dtype = torch.bfloat16
    model(tokens, borders)
    assert all(torch.equal(*both) for both in zip(before, model.rope(positions), strict=True)) and before[0].dtype == torch.float32
    assert len(computed) == 1
    assert model.rope(positions.to("meta"))[0].is_meta and len(computed) == 2, "again where the model moves"
    assert torch.equal(model.rope(positions)[0], before[0])
    assert [name for name in (*model.state_dict(), *dict(model.named_buffers())) if "freq" in name] == []


def test_router_scores_are_fp32_whatever_the_input():
    x, weight = torch.randn(9, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    routing = route(x, weight, torch.zeros(8), top_k=8, num_groups=1, top_groups=1, normalize=False, scale=1.0)
    exact = torch.sigmoid(x.double() @ weight.double().T).gather(1, routing.experts_TK)
    assert (routing.weights_TK - exact).abs().max() < 1e-6


def test_experts_are_summed_in_fp32():
    routing = Routing(torch.arange(1001)[None], torch.full((1, 1001), 0.1))
    y = torch.ones(1001, 4).bfloat16()
    assert dispatch(routing, 1001).combine(y)[0, 0].item() == pytest.approx(100.1, rel=2**-8)  # bf16 sums stop growing long before


def test_the_loss_is_fp32_on_bf16_logits():
    hidden, weight = torch.randn(40, 16).bfloat16(), torch.randn(500, 16).bfloat16()
    targets = torch.arange(40)
    exact = torch.nn.functional.cross_entropy((hidden @ weight.T).double(), targets, reduction="sum")
    head = Head(16, 500, bias=False, dtype=torch.bfloat16)
    head.weight = torch.nn.Parameter(weight)
    assert linear_cross_entropy(head, hidden, targets).item() == pytest.approx(exact.item(), rel=1e-6)


def test_groups_limit_the_choice():
    logits = torch.tensor([[9.0, -9.0, 3.0, 3.0, -9.0, -9.0]])  # the best expert stands alone in its group
    one, all_groups = (
        route(logits, torch.eye(6), torch.zeros(6), top_k=2, num_groups=3, top_groups=n, normalize=False, scale=1.0)
        .experts_TK[0]
        .sort()
        .values.tolist()
        for n in (1, 3)
    )
    assert one == [2, 3] and 0 in all_groups


def test_linear_rope_scaling_divides_the_angles():
    assert torch.equal(rope_frequencies(8, 1e4, 4.0), rope_frequencies(8, 1e4) / 4)
