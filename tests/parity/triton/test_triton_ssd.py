"""The scan's kernels, in Triton's interpreter, against the recurrence and beside the PyTorch path."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nemotune.ops.documents import Documents
from nemotune.ops.ssd import ssd
from nemotune.ops.ssd_ref import ssd_ref

triton_ssd = pytest.importorskip("nemotune.ops.triton_ssd", reason="needs Triton", exc_type=ImportError)
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiled kernels are tested in tests/gpu")


def documents_of(lengths):
    return Documents(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32))


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(tokens, *, heads, groups, head_dim, state, dtype=torch.float32):
    """The row of x, B and C as the convolution leaves it, dt after softplus, A, D."""
    row = F.silu(drawn(tokens, heads * head_dim + 2 * groups * state, seed=1)).to(dtype)
    dt = F.softplus(drawn(tokens, heads, seed=2) - 2)
    return [t.requires_grad_() for t in (row, dt, -1 - 3 * drawn(heads, seed=3).sigmoid(), drawn(heads, seed=4))]


def scanned(function, inputs, lengths, *, groups, head_dim, final_states=False):
    """The result, the final states if asked for, and the gradients of inputs that have one; x, B and C are slices of the row."""
    row, dt, A, D = inputs
    inner = len(A) * head_dim
    x, B, C = row.split([inner, *[(row.shape[1] - inner) // 2] * 2], dim=-1)
    x, B, C = x.unflatten(-1, (len(A), -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
    found = function(x, dt, A, B, C, D, documents_of(lengths))[: 1 + final_states]
    return [
        *found,
        *torch.autograd.grad(found, [t for t in inputs if t.requires_grad], [drawn(*t.shape, seed=9).to(t.dtype) for t in found]),
    ]


def assert_same(found, expected, tolerance=1e-5):
    """Within `tolerance` of each tensor's maximum; 1e-7 is for A's gradient in documents of one token, which is zero."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max() + 1e-7


def test_chunks_begin_anew_at_each_border():
    borders = documents_of([1, 130, 64]).chunk_borders(64)
    assert borders.chunks.tolist() == [0, 1, 65, 129, 131, 195] and borders.documents.tolist() == [0, 1, 4, 5]
    assert borders.chunks.dtype == borders.documents.dtype == torch.int32


@pytest.mark.parametrize(
    "lengths, heads, groups, head_dim, state, chunk_size, final_states",
    [
        ([1, 5, 64, 3, 130], 2, 1, 8, 16, 64, True),
        ([40, 1, 33], 4, 2, 12, 20, 16, False),
        ([1], 2, 2, 16, 8, 128, True),
        ([70, 9], 3, 1, 20, 5, 48, False),
    ],
)
def test_kernels_equal_the_recurrence_and_the_pytorch_path(lengths, heads, groups, head_dim, state, chunk_size, final_states):
    inputs = inputs_of(sum(lengths), heads=heads, groups=groups, head_dim=head_dim, state=state)
    shape = dict(groups=groups, head_dim=head_dim, final_states=final_states)
    options = dict(chunk_size=chunk_size, final_states=final_states)
    found = scanned(partial(triton_ssd.ssd, **options), inputs, lengths, **shape)
    assert_same(found, scanned(ssd_ref, inputs, lengths, **shape))
    assert_same(found, scanned(partial(ssd, **options), inputs, lengths, **shape))


@pytest.mark.parametrize("frozen", [(2, 3), (0,), (0, 1, 2)])
def test_what_is_frozen_has_no_gradient_and_leaves_the_others_as_they_are(frozen):
    inputs, shape = inputs_of(25, heads=2, groups=1, head_dim=8, state=8), dict(groups=1, head_dim=8)
    for i in frozen:
        inputs[i].requires_grad_(False)
    found = scanned(partial(triton_ssd.ssd, chunk_size=16), inputs, [20, 5], **shape)
    assert len(found) == 1 + len(inputs) - len(frozen)
    assert_same(found, scanned(ssd_ref, inputs, [20, 5], **shape))


def test_a_changed_document_leaves_the_bits_of_the_others():
    inputs, shape = inputs_of(60, heads=2, groups=1, head_dim=8, state=8), dict(groups=1, head_dim=8)
    before = scanned(partial(triton_ssd.ssd, chunk_size=16), inputs, [7, 33, 20], **shape)
    with torch.no_grad():
        inputs[0][7:40] = torch.nan
    after = scanned(partial(triton_ssd.ssd, chunk_size=16), inputs, [7, 33, 20], **shape)
    for ours, others in zip(after[:3], before[:3], strict=True):  # y, and the gradients of the row and of dt
        assert torch.equal(ours[:7], others[:7]) and torch.equal(ours[40:], others[40:]) and ours[7:40].isnan().any()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_forgetting_within_a_token_gives_no_value_that_is_not_finite():
    """A decay of exp(-1000) a token: its inverse, above the diagonal of a chunk, is infinite. A's gradient is then about zero."""
    row, _, _, D = inputs_of(20, heads=2, groups=1, head_dim=8, state=8)
    inputs, shape = (
        [row, torch.full((20, 2), 50.0).requires_grad_(), torch.full((2,), -20.0).requires_grad_(), D],
        dict(groups=1, head_dim=8),
    )
    found, exact = (scanned(f, inputs, [20], **shape) for f in (partial(triton_ssd.ssd, chunk_size=16), ssd_ref))
    assert_same([*found[:3], found[4]], [*exact[:3], exact[4]])
    assert found[3].isfinite().all()


def relative_rms(got, exact):
    return ((got.double() - exact.double()).square().mean() / exact.double().square().mean()).sqrt().item()


@pytest.mark.usefixtures("bf16_as_on_a_gpu")
def test_bf16_adds_the_rounding_of_its_factors_to_the_error_of_the_pytorch_path():
    """Which on the CPU rounds only what leaves a chunk. As large an error again, of another sign each time: sqrt(2) of it."""
    lengths, shape = [1, 5, 64, 3, 130], dict(groups=2, head_dim=24)
    inputs = inputs_of(sum(lengths), heads=4, state=32, dtype=torch.bfloat16, **shape)
    exact = scanned(ssd_ref, [t.detach().float().requires_grad_() for t in inputs], lengths, **shape)
    found, theirs = (scanned(partial(f, chunk_size=64), inputs, lengths, **shape) for f in (triton_ssd.ssd, ssd))
    for ours, other, reference in zip(found, theirs, exact, strict=True):
        assert ours.dtype == other.dtype
        assert relative_rms(ours, reference) <= 2**0.5 * relative_rms(other, reference)
