"""NF4 against its definition, weight by weight, and the products that use it."""

from __future__ import annotations

import pytest
import torch

from nemotune.ops import nf4


def matrices() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(96, 192, generator=generator)
    return {
        "random": random,
        "uneven rows": random * torch.rand(96, 1, generator=generator) ** 8,
        "sparse": random * (torch.rand(96, 192, generator=generator) < 0.01),
        "zero": torch.zeros(96, 192),
        "constant": torch.full((96, 192), -3.0),
        "tiny": random * 1e-30,
        "bf16": (random * 0.02).bfloat16(),
    }


@pytest.mark.parametrize("name", matrices())
def test_every_weight_takes_the_nearest_of_sixteen_values(name):
    weight = matrices()[name].float()
    quantized = nf4.quantize(weight)
    blocks = weight.reshape(-1, nf4.BLOCK)
    codes = torch.stack((quantized.codes >> 4, quantized.codes & 15), dim=-1).view(blocks.shape).long()
    scaled = blocks / blocks.abs().amax(-1, keepdim=True).clamp(min=1e-38)
    distances = (scaled.unsqueeze(-1) - torch.tensor(nf4.CODEBOOK)).abs()
    chosen = distances.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    assert torch.all(chosen <= distances.amin(-1) + 1e-6)


@pytest.mark.parametrize("name", matrices())
def test_scales_survive_their_own_quantisation(name):
    weight = matrices()[name].float()
    absmax = weight.reshape(-1, nf4.BLOCK).abs().amax(-1)
    got = nf4.block_absmax(nf4.quantize(weight))
    # neighbours in the largest decade of the dynamic code are 0.0141 apart
    spread = (absmax - absmax.mean()).abs().max()
    assert (got - absmax).abs().max() <= 0.5 * 0.0141 * spread + 1e-6 * absmax.max()


def test_four_bits_and_a_bit_for_scales():
    quantized = nf4.quantize(torch.randn(256, 1024))
    num_bytes = sum(field.numel() * field.element_size() for field in quantized)
    assert num_bytes * 8 / (256 * 1024) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient_are_those_of_the_dequantised_matrix(dtype):
    weight = torch.randn(128, 64)
    quantized = nf4.quantize(weight)
    wide = nf4.dequantize(quantized, (128, 64), dtype)
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    nf4.nf4_linear(x, quantized, (128, 64)).square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(expected, wide).square().sum().backward()
    assert torch.equal(x.grad, expected.grad)


def test_backward_keeps_no_wider_form_and_no_input():
    quantized = nf4.quantize(torch.randn(128, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nf4.nf4_linear(torch.randn(1000, 64, requires_grad=True), quantized, (128, 64))
    assert sum(t.numel() * t.element_size() for t in saved) < 128 * 64


def test_a_matrix_dequantised_in_pieces_is_the_matrix(monkeypatch):
    quantized = nf4.quantize(torch.randn(96, 192))
    whole = nf4.dequantize(quantized, (96, 192), torch.bfloat16)
    monkeypatch.setattr(nf4, "AT_ONCE", {False: 640})
    assert torch.equal(nf4.dequantize(quantized, (96, 192), torch.bfloat16), whole)


def quantized_stack(weights_EOI: torch.Tensor) -> nf4.NF4:
    stack = nf4.empty(tuple(weights_EOI.shape))
    for i, weight in enumerate(weights_EOI):
        for field, value in zip(stack.at(i), nf4.quantize(weight), strict=True):
            field.copy_(value)
    return stack


def test_experts_are_matrices_of_their_own():
    weights = torch.randn(3, 40, 64)
    stack = quantized_stack(weights)
    expected = torch.stack([nf4.dequantize(nf4.quantize(weight), (40, 64), torch.float32) for weight in weights])
    assert torch.equal(nf4.dequantize(stack, (3, 40, 64), torch.float32), expected)
    assert torch.equal(nf4.dequantize(stack.at(1), (40, 64), torch.float32), expected[1])


@pytest.mark.parametrize("counts", [[3, 0, 2, 4], [0, 9, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_grouped_product_and_gradient_are_those_of_the_dequantised_stack(counts):
    stack = quantized_stack(torch.randn(4, 40, 64))
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    x = torch.randn(sum(counts), 64, requires_grad=True)
    y = nf4.nf4_grouped_linear(x, stack, (4, 40, 64), ends)
    y.square().sum().backward()
    wide = nf4.dequantize(stack, (4, 40, 64), torch.float32)
    expected = x.detach().clone().requires_grad_()
    reference = torch.cat([part @ weight.T for part, weight in zip(expected.split(counts), wide, strict=True)])
    reference.square().sum().backward()
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(x.grad, expected.grad)


def test_experts_without_rows_are_not_dequantised(monkeypatch):
    stack, shapes, dequantize = quantized_stack(torch.randn(4, 40, 64)), [], nf4.dequantize
    monkeypatch.setattr(nf4, "dequantize", lambda q, shape, dtype: shapes.append(shape) or dequantize(q, shape, dtype))
    nf4.nf4_grouped_linear(torch.randn(5, 64), stack, (4, 40, 64), torch.tensor([0, 5, 5, 5], dtype=torch.int32))
    assert shapes == [(1, 40, 64)]


@pytest.mark.parametrize("make", [nf4.empty, lambda shape: nf4.quantize(torch.zeros(shape))])
def test_a_size_that_64_does_not_divide_is_refused(make):
    with pytest.raises(ValueError, match="multiple of 64"):
        make((3, 20))
