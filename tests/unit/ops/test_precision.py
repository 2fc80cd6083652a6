"""Norms and the recurrence's decay are computed in fp32 also where their inputs are bf16: the result is rounded once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nemotune.ops.documents import Documents
from nemotune.ops.norm import gated_group_rms_norm, rms_norm
from nemotune.ops.ssd import ssd
from nemotune.ops.ssd_ref import ssd_step

ONCE = 2**-8 * 1.001  # bf16 keeps 8 bits, so half a unit of the last; and the fp32 arithmetic before it


def bf16(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_rounded_once(got, exact):
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= ONCE * exact.abs()).all()


def test_rms_norm_of_bf16_is_rounded_once():
    x, weight = bf16(16, 512), bf16(512, seed=1)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    normed = rms_norm(x, weight, 1e-5)
    assert_rounded_once(normed, exact)
    assert not normed._is_view()  # of which FSDP warns


def test_gated_group_rms_norm_of_bf16_is_rounded_once():
    x, gate, weight = bf16(16, 512), bf16(16, 512, seed=1), bf16(512, seed=2)
    gated = (x.double() * F.silu(gate.double())).unflatten(-1, (4, -1))
    exact = (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * weight.double()
    assert_rounded_once(gated_group_rms_norm(x, gate, weight, num_groups=4, eps=1e-5), exact)


DT = 2**-4 * (1 + 0.99 * 2**-8)  # bf16 makes it 2^-4, and the decay of 256 tokens 6 % too slow


@pytest.mark.parametrize("chunk_size", [32, 256])
def test_the_decay_of_a_bf16_scan_is_fp32(chunk_size):
    """One token at the start, and how much is left of it at each later one: exp(-t dt) dt, with five roundings to bf16 on the way."""
    x = torch.zeros(256, 1, 1, dtype=torch.bfloat16)
    x[0] = 1
    ones = torch.ones(256, 1, 1, dtype=torch.bfloat16)
    documents = Documents(torch.tensor([0, 256], dtype=torch.int32))
    y, state = ssd(
        x, torch.full((256, 1), DT), -torch.ones(1), ones, ones, torch.zeros(1), documents, chunk_size=chunk_size, final_states=True
    )
    exact = DT * torch.exp(-DT * torch.arange(256, dtype=torch.float64))
    assert ((y.flatten() / exact - 1).abs() < 5 * 2**-8).all()
    assert state is not None and abs(state.item() / exact[-1].item() - 1) < 5 * 2**-8


def test_the_decay_of_a_bf16_step_is_fp32():
    one, dt, state = torch.ones(1, 1, 1, dtype=torch.bfloat16), torch.full((1, 1), DT), torch.full((1, 1, 1, 1), 1.0)
    for _ in range(256):
        _, state = ssd_step(0 * one, dt, -torch.ones(1), one, one, torch.zeros(1), state)
    assert abs(state.item() / math.exp(-256 * DT) - 1) < 256 * 2 * 2**-24  # a rounding each of the factor and the product
