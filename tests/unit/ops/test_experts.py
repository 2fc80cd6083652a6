"""Grouped products of any width, experts without tokens, sums in a fixed order; nothing that waits for a device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nemotune.ops import grouped
from nemotune.ops.experts import Routing, dispatch, route
from nemotune.ops.grouped import grouped_linear

ENDS = torch.tensor([3, 3, 10, 16, 16], dtype=torch.int32)  # the second and the last of five experts have no rows


def drawn(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def one_by_one(x_MI, weight_EOI):
    starts = [0, *ENDS.tolist()]
    return torch.cat([F.linear(x_MI[start:end], weight) for start, end, weight in zip(starts, ENDS.tolist(), weight_EOI, strict=False)])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])  # the last bits of a sum in another order
@pytest.mark.parametrize("in_features, out_features", [(16, 3), (3, 16), (5, 7), (16, 8)])
def test_a_rank_of_any_size_gives_the_product_of_each_expert(in_features, out_features, dtype, tolerance):
    x, weight = drawn(16, in_features, seed=1, dtype=dtype), drawn(5, out_features, in_features, seed=2, dtype=dtype)
    grad = drawn(16, out_features, seed=3, dtype=dtype).detach()
    got, expected = grouped_linear(x, weight, ENDS), one_by_one(x, weight)
    assert got.shape == expected.shape and got.dtype == dtype
    pairs = zip(torch.autograd.grad(got, [x, weight], grad), torch.autograd.grad(expected, [x, weight], grad), strict=True)
    for ours, theirs in [(got, expected), *pairs]:
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_fp32_weights_compute_in_the_dtype_of_the_input_and_have_fp32_gradients():
    x, weight = drawn(16, 8, seed=1, dtype=torch.bfloat16), drawn(5, 8, 8, seed=2)
    y = grouped_linear(x, weight, ENDS)
    y.sum().backward()  # a gradient without strides of its own
    assert y.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_an_expert_without_rows_has_no_gradient_whatever_the_kernel_leaves_there(monkeypatch):
    """On Blackwell the weights' product of an empty group is what the memory held before."""
    kernel = F.grouped_mm

    def leaves_garbage(a, b, *, offs):
        result = kernel(a, b, offs=offs)
        if result.ndim == 3:
            result[[1, 4]] = torch.nan
        return result

    monkeypatch.setattr(grouped.F, "grouped_mm", leaves_garbage)
    weight = drawn(5, 8, 8, seed=2)
    grouped_linear(drawn(16, 8, seed=1), weight, ENDS).square().sum().backward()
    assert weight.grad.flatten(1).any(1).tolist() == [True, False, True, True, False]
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("counts", [[3, 0, 40, 1], [0, 33, 0, 0], [0, 0, 0, 64], [1, 1, 1, 1]])
def test_rows_of_an_expert_are_rounded_up_and_the_next_one_writes_over_them(counts):
    """On the CPU in 16 bits; products of whole numbers are exact."""
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    x, weight = (
        torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).bfloat16() for shape in ((sum(counts), 8), (4, 8, 8))
    )
    expected = torch.cat([part @ matrix for part, matrix in zip(x.split(counts), weight, strict=True)])
    assert torch.equal(grouped.grouped_product(x, weight, ends), expected)


def test_a_frozen_weight_saves_no_input():
    saved = []
    x, weight = drawn(16, 8, seed=1), drawn(5, 8, 8, seed=2).detach()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grouped_linear(x, weight, ENDS)
    assert {t.data_ptr() for t in saved} == {weight.data_ptr(), ENDS.data_ptr()}


def test_a_row_is_sent_and_combined_without_waiting_for_the_device():
    """On the meta device there is nothing to wait for: whatever reads a value there fails."""
    x = torch.empty(7, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    up, down = torch.empty(6, 24, 16, device="meta"), torch.empty(6, 16, 24, device="meta", requires_grad=True)
    weight, bias = torch.empty(6, 16, device="meta"), torch.empty(6, device="meta")
    sent = dispatch(route(x, weight, bias, top_k=2, num_groups=3, top_groups=2, normalize=True, scale=2.5), 6)
    y = sent.combine(grouped_linear(grouped_linear(sent.sorted_rows(x), up, sent.ends_E), down, sent.ends_E))
    y.sum().backward()
    assert x.grad.shape == x.shape and down.grad.shape == down.shape


def test_experts_of_a_token_are_rising():
    routing = route(
        torch.randn(50, 16), torch.randn(12, 16), torch.zeros(12), top_k=5, num_groups=1, top_groups=1, normalize=True, scale=1.0
    )
    assert (routing.experts_TK.diff() > 0).all()


def test_values_of_tokens_lie_where_their_rows_do():
    sent = dispatch(Routing(torch.tensor([[1, 2], [0, 2], [0, 1]]), torch.ones(3, 2)), 3)
    assert sent.of_tokens(torch.tensor([10, 20, 30])).tolist() == [20, 30, 10, 30, 10, 20]
    assert sent.sorted_rows(torch.tensor([[10.0], [20.0], [30.0]])).flatten().tolist() == [20, 30, 10, 30, 10, 20]


def test_a_token_adds_up_its_experts_in_their_order():
    """In fp32, (2^30 + 1) - 2^30 is 0 and (2^30 - 2^30) + 1 is 1."""
    sent = dispatch(Routing(torch.tensor([[0, 1, 2], [0, 2, 1]]), torch.ones(2, 3)), 3)
    y = torch.tensor([2.0**30, 2.0**30, 1.0, 1.0, -(2.0**30), -(2.0**30)]).unsqueeze(1)  # sorted by expert, then by token
    assert sent.combine(y).flatten().tolist() == [0.0, 1.0]


def test_the_gradient_of_a_token_sent_to_many_experts_is_summed_in_fp32():
    sent = dispatch(Routing(torch.arange(1024)[None], torch.ones(1, 1024)), 1024)
    x = torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True)
    sent.sorted_rows(x).backward(torch.ones(1024, 4, dtype=torch.bfloat16))
    assert x.grad.tolist() == [[1024.0] * 4]  # sums in bf16 end at 256


def test_the_gradient_of_the_weights_is_the_fp32_product_of_bf16_rows():
    sent = dispatch(Routing(torch.tensor([[0, 1]]), torch.ones(1, 2).requires_grad_()), 2)
    y, grad = drawn(2, 512, seed=1, dtype=torch.bfloat16), drawn(1, 512, seed=2, dtype=torch.bfloat16).detach()
    sent.combine(y).backward(grad)
    exact = (y.double() * grad.double()).sum(-1)
    assert (sent.weights_TK.grad - exact).abs().max() < 512**0.5 * 2**-24 * 10


def test_a_token_has_the_same_bits_in_any_company():
    def through(rows):
        x_TD = x[rows].clone().requires_grad_()
        weights = routing.weights_TK[rows].clone().requires_grad_()
        sent = dispatch(Routing(routing.experts_TK[rows], weights), 6)
        out = sent.combine(sent.sorted_rows(x_TD))
        return out, *torch.autograd.grad(out, [x_TD, weights], x[rows].cos())

    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    routing = route(x, torch.randn(6, 16), torch.zeros(6), top_k=3, num_groups=1, top_groups=1, normalize=True, scale=1.0)
    for whole, alone in zip(through(slice(0, 40)), through(slice(7, 20)), strict=True):
        assert torch.equal(whole[7:20], alone)
