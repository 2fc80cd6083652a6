"""A bf16 scan is as close to the recurrence as mamba-ssm's kernels are, whose roundings are played here in fp32 arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nemotune.ops.documents import Documents
from nemotune.ops.ssd import ssd
from nemotune.ops.ssd_ref import ssd_ref

HEADS, HEAD_DIM, GROUPS, STATE, CHUNK = 8, 64, 2, 128, 128


def drawn(tokens, *, dt_max, D, seed):
    """As a layer of Nemotron-H sees them: x, B and C after silu, dt spread over its range, A in -[1, 16]."""
    generator = torch.Generator().manual_seed(seed)
    x, B, C = (
        F.silu(torch.randn(tokens, *shape, generator=generator)).bfloat16()
        for shape in ((HEADS, HEAD_DIM), (GROUPS, STATE), (GROUPS, STATE))
    )
    start = torch.rand(HEADS, generator=generator) * math.log(dt_max / 0.001) + math.log(0.001)
    dt = (start + 0.5 * torch.randn(tokens, HEADS, generator=generator)).exp()
    return x, dt, -1 - 15 * torch.rand(HEADS, generator=generator), B, C, D * (1 + 0.3 * torch.randn(HEADS, generator=generator))


def rounded(tensor):
    return tensor.bfloat16().float()


def with_the_roundings_of_mamba_ssm(x, dt, A, B, C, D):
    """mamba_chunk_scan_combined: B times decay and dt, (C B^T) times decay and dt, and passed states are rounded, and so is the sum of all."""

    def chunked(t):
        return t.float().unflatten(0, (-1, CHUNK)).transpose(1, 2)  # [C, N, Q, ...]

    x, B, C = chunked(x), *(chunked(t).repeat_interleave(HEADS // GROUPS, 1) for t in (B, C))
    dt = chunked(dt)
    log_decay = (dt * A[:, None]).cumsum(-1)
    between = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill(torch.ones(CHUNK, CHUNK).triu(1).bool(), -torch.inf)
    ends = x.mT @ rounded(B * ((log_decay[..., -1:] - log_decay).exp() * dt).unsqueeze(-1))
    state, states = torch.zeros_like(ends[0]), []
    for end, decay in zip(ends, log_decay[..., -1].exp(), strict=True):
        states.append(rounded(state))
        state = end + decay[:, None, None] * state
    y = log_decay.exp().unsqueeze(-1) * (C @ torch.stack(states).mT)
    y = y + rounded((C @ B.mT) * between.exp() * dt.unsqueeze(-2)) @ x + D[:, None, None] * x
    return rounded(y.transpose(1, 2).flatten(0, 1))


def relative_rms(got, exact):
    return ((got.double() - exact.double()).square().mean() / exact.double().square().mean()).sqrt().item()


@pytest.mark.parametrize("D", [1.0, 0.0])
@pytest.mark.parametrize("tokens, dt_max", [(128, 0.1), (512, 0.1), (1024, 0.02), (512, 1.0)])
def test_the_error_of_a_bf16_scan_is_that_of_mamba_ssm(tokens, dt_max, D):
    """Whether x or B carries the weights of a state is all that differs; over 64,000 values and more, 1 % is chance."""
    inputs = x, dt, A, B, C, D = drawn(tokens, dt_max=dt_max, D=D, seed=tokens)
    documents = Documents(torch.tensor([0, tokens], dtype=torch.int32))
    exact, _ = ssd_ref(x.float(), dt, A, B.float(), C.float(), D, documents)
    ours, _ = ssd(*inputs, documents, chunk_size=CHUNK)
    assert relative_rms(ours, exact) <= 1.01 * relative_rms(with_the_roundings_of_mamba_ssm(*inputs), exact)


def dense(x, dt, A, B, C):
    """One document's outputs as one matrix over its tokens, D being zero; in the dtype of all."""
    B, C = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (B, C))
    log_decay_NT = (dt * A).cumsum(0).T
    between = (log_decay_NT.unsqueeze(-1) - log_decay_NT.unsqueeze(-2)).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    return torch.einsum("nij,ins,jns,jn,jnp->inp", between.exp(), C, B, dt, x)


def test_the_gradient_of_A_loses_little_to_sums_that_cancel():
    """The mean over many rows tells it from luck."""
    errors = []
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        x, B, C, w = (torch.randn(90, *shape, generator=generator) for shape in ((4, 16), (2, 16), (2, 16), (4, 16)))
        dt, A = F.softplus(torch.randn(90, 4, generator=generator)), -torch.rand(4, generator=generator).mul(1.5).exp()
        A_N, exact_N = A.clone().requires_grad_(), A.double().requires_grad_()
        y, _ = ssd(x, dt, A_N, B, C, torch.zeros(4), Documents(torch.tensor([0, 90], dtype=torch.int32)), chunk_size=8)
        (y * w).sum().backward()
        (dense(x.double(), dt.double(), exact_N, B.double(), C.double()) * w).sum().backward()
        errors.append(((A_N.grad - exact_N.grad).abs().max() / exact_N.grad.abs().max()).item())
    assert sum(errors) / len(errors) < 1.1e-6, sum(errors) / len(errors)
