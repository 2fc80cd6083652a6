"""The convolution's kernels, in Triton's interpreter, against the definition and beside the PyTorch path."""

from __future__ import annotations

import os

import pytest
import torch
from random_models import relative

from nemotune.ops import conv
from nemotune.ops.documents import Documents

triton_conv = pytest.importorskip("nemotune.ops.triton_conv", reason="needs Triton", exc_type=ImportError)
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiled kernels are tested in tests/gpu")


def documents_of(lengths):
    return Documents(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32))


def drawn(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def with_gradients(function, row, weight, bias, lengths):
    """Of a slice of a wider row, as in_proj gives it: the result, then the gradients of what has one."""
    y = function(row[:, 3 : 3 + weight.shape[0]], weight, bias, documents_of(lengths))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    inputs = [t for t in (row, weight, bias) if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.parametrize("lengths", [[1], [1, 5, 64, 3, 130], [2, 1, 1, 40]])
@pytest.mark.parametrize("channels, width, bias", [(20, 4, True), (140, 4, False), (7, 2, True), (5, 1, False)])
def test_kernels_equal_the_definition(lengths, channels, width, bias):
    inputs = drawn(sum(lengths), channels + 9, seed=1), drawn(channels, width, seed=2), drawn(channels, seed=3) if bias else None
    found = with_gradients(triton_conv.causal_conv1d, *inputs, lengths)
    for ours, reference in zip(found, with_gradients(conv.causal_conv1d_ref, *inputs, lengths), strict=True):
        assert ours.dtype == reference.dtype and relative(ours, reference) < 1e-5


@pytest.mark.parametrize("trained", [(), (1,), (2,)])
def test_frozen_weights_have_no_gradient_and_leave_the_others_as_they_are(trained):
    inputs = [drawn(30, 29, seed=1), drawn(20, 4, seed=2), drawn(20, seed=3)]
    for i in (1, 2):
        inputs[i].requires_grad_(i in trained)
    found = with_gradients(triton_conv.causal_conv1d, *inputs, [11, 19])
    for ours, reference in zip(found, with_gradients(conv.causal_conv1d_ref, *inputs, [11, 19]), strict=True):
        assert relative(ours, reference) < 1e-5


@pytest.mark.usefixtures("bf16_as_on_a_gpu")
def test_bf16_is_no_further_from_the_truth_than_pytorchs():
    """Inputs in bf16, results rounded once; fp32 weights are not rounded, as PyTorch's convolution would have them."""
    lengths = [1, 5, 64, 3, 130]
    inputs = drawn(sum(lengths), 29, seed=1, dtype=torch.bfloat16), drawn(20, 4, seed=2), drawn(20, seed=3)
    wide = [t.detach().float().requires_grad_() for t in inputs]
    exact = with_gradients(conv.causal_conv1d_ref, *wide, lengths)
    ours, theirs = (with_gradients(f, *inputs, lengths) for f in (triton_conv.causal_conv1d, conv.causal_conv1d))
    for got, other, reference in zip(ours, theirs, exact, strict=True):
        assert got.dtype == other.dtype
        assert relative(got.float(), reference) <= max(relative(other.float(), reference), 2**-8)


def test_a_changed_document_leaves_the_bits_of_the_others():
    row, weight = drawn(40, 29, seed=1), drawn(20, 4, seed=2)
    before = with_gradients(triton_conv.causal_conv1d, row, weight, None, [7, 20, 13])
    changed = torch.cat([row[:7], torch.full((20, 29), torch.nan), row[27:]]).detach().requires_grad_()
    after = with_gradients(triton_conv.causal_conv1d, changed, weight, None, [7, 20, 13])
    for ours, others in zip(after[:2], before[:2], strict=True):
        assert torch.equal(ours[:7], others[:7]) and torch.equal(ours[27:], others[27:]) and ours[7:27].isnan().any()
