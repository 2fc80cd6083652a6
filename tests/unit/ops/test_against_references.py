"""Each fast path against the definition beside it, forward and gradient, over documents of awkward lengths."""

from __future__ import annotations

import pytest
import torch

from nemotune.models.base import Head
from nemotune.ops import conv as conv_module
from nemotune.ops import norm as norm_module
from nemotune.ops.attention import attention_step, varlen_attention, varlen_attention_ref
from nemotune.ops.conv import causal_conv1d, causal_conv1d_ref, causal_conv1d_step, conv_state
from nemotune.ops.cross_entropy import linear_cross_entropy
from nemotune.ops.documents import Documents
from nemotune.ops.experts import Routing, dispatch, experts_ref, route
from nemotune.ops.grouped import grouped_linear
from nemotune.ops.norm import gated_group_rms_norm, gated_group_rms_norm_ref, rms_norm
from nemotune.ops.ssd import ssd
from nemotune.ops.ssd_ref import ssd_ref, ssd_step

LENGTHS = [[1], [3, 1, 1], [8, 8], [7, 20, 1, 9], [33]]


def documents_of(lengths):
    return Documents(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32))


def leaves(*shapes, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).mul(scale).requires_grad_() for shape in shapes]


def assert_same(ours, reference, inputs, tolerance=1e-5):
    """Values and the gradients of every input agree within `tolerance` of each tensor's maximum."""
    weights = torch.randn(reference.shape, generator=torch.Generator().manual_seed(9))
    for got, expected in zip(
        [ours, *torch.autograd.grad((ours * weights).sum(), inputs, retain_graph=True)],
        [reference, *torch.autograd.grad((reference * weights).sum(), inputs, retain_graph=True)],
        strict=True,
    ):
        assert (got - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-6)


def ssd_inputs(tokens, heads=4, head_dim=8, groups=2, state=16):
    x, dt, A_log, B, C, D = leaves(
        (tokens, heads, head_dim), (tokens, heads), (heads,), (tokens, groups, state), (tokens, groups, state), (heads,)
    )
    return x, dt, A_log, B, C, D


@pytest.mark.parametrize("chunk_size", [1, 4, 8, 64])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_chunked_ssd_equals_the_recurrence(lengths, chunk_size):
    inputs = x, dt, A_log, B, C, D = ssd_inputs(sum(lengths))
    args = x, torch.nn.functional.softplus(dt), -A_log.exp(), B, C, D, documents_of(lengths)
    y, states = ssd(*args, chunk_size=chunk_size, final_states=True)
    y_ref, states_ref = ssd_ref(*args)
    assert_same(y, y_ref, inputs)
    assert_same(states, states_ref, inputs[:4])
    assert_same(ssd(*args, chunk_size=chunk_size)[0], y_ref, inputs)


def test_ssd_forgets_within_a_token_without_a_value_that_is_not_finite():
    """A decay of exp(-1000) a token: its inverse, above the diagonal of a chunk, is infinite."""
    x, _, _, B, C, D = ssd_inputs(20)
    dt, A = torch.full((20, 4), 50.0).requires_grad_(), torch.full((4,), -20.0).requires_grad_()
    args = x, dt, A, B, C, D, documents_of([20])
    inputs = x, dt, B, C, D
    assert_same(ssd(*args, chunk_size=8)[0], ssd_ref(*args)[0], inputs)
    assert torch.autograd.grad(ssd(*args, chunk_size=8)[0].sum(), A)[0].isfinite().all()


@pytest.mark.parametrize("lengths", LENGTHS)
def test_sixteen_bits_are_rounded_once(lengths):
    """Scan and convolution in bf16, forward and gradient: to the bit what fp32 gives for the same values, rounded."""
    x, dt, A_log, B, C, D = (t.detach() for t in ssd_inputs(sum(lengths)))
    xBC, (weight, bias) = torch.cat([x.flatten(1), B.flatten(1), C.flatten(1)], -1), (t.detach() for t in leaves((96, 4), (96,), seed=1))
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).bfloat16()

    def scan(dtype):
        inputs = [t.bfloat16().to(dtype).requires_grad_() for t in (x, B, C)]
        y, _ = ssd(inputs[0], dt.exp(), -A_log.exp(), *inputs[1:], D, documents_of(lengths), chunk_size=4)
        return y, *torch.autograd.grad(y, inputs, dy.to(dtype))

    def convolution(dtype):
        inputs = [t.bfloat16().to(dtype).requires_grad_() for t in (xBC, weight, bias)]
        y = causal_conv1d(*inputs, documents_of(lengths))
        return y, *torch.autograd.grad(y, inputs, torch.ones_like(y))

    for function in (scan, convolution):
        for ours, wide in zip(function(torch.bfloat16), function(torch.float32), strict=True):
            assert torch.equal(ours, wide.bfloat16())


@pytest.mark.parametrize("heads, groups", [(4, 1), (4, 4), (6, 3)])
def test_ssd_groups_share_b_and_c(heads, groups):
    inputs = x, dt, A_log, B, C, D = ssd_inputs(11, heads=heads, groups=groups)
    args = x, torch.nn.functional.softplus(dt), -A_log.exp(), B, C, D, documents_of([6, 5])
    assert_same(ssd(*args, chunk_size=4)[0], ssd_ref(*args)[0], inputs)


def test_ssd_step_continues_the_scan():
    x, dt, A_log, B, C, D = (t.detach() for t in ssd_inputs(9))
    dt, A = torch.nn.functional.softplus(dt), -A_log.exp()
    whole, _ = ssd(x, dt, A, B, C, D, documents_of([9]), chunk_size=4)
    _, state = ssd(x[:8], dt[:8], A, B[:8], C[:8], D, documents_of([8]), chunk_size=4, final_states=True)
    y, _ = ssd_step(x[8:], dt[8:], A, B[8:], C[8:], D, state)
    torch.testing.assert_close(y, whole[8:])


@pytest.mark.parametrize("at_once", [2**17, 100, 1])  # the row whole; four tokens at a time; one
def test_norms_equal_pytorchs(at_once, monkeypatch):
    monkeypatch.setattr(norm_module, "AT_ONCE", at_once)
    inputs = x, _, weight = leaves((3, 5, 24), (3, 5, 24), (24,))
    assert_same(rms_norm(x, weight, 1e-3), torch.nn.functional.rms_norm(x, (24,), weight, 1e-3), (x, weight))
    for num_groups in (1, 4):
        args = dict(num_groups=num_groups, eps=1e-3)
        assert_same(gated_group_rms_norm(*inputs, **args), gated_group_rms_norm_ref(*inputs, **args), inputs)


@pytest.mark.parametrize("at_once", [2**18, 40, 1])  # documents whole; a few tokens of them at a time; each alone
@pytest.mark.parametrize("lengths", LENGTHS)
def test_convolution_equals_pytorch_per_document(lengths, at_once, monkeypatch):
    monkeypatch.setattr(conv_module, "AT_ONCE", at_once)
    inputs = x, weight, bias = leaves((sum(lengths), 6), (6, 4), (6,))
    documents = documents_of(lengths)
    assert_same(causal_conv1d(x, weight, bias, documents), causal_conv1d_ref(x, weight, bias, documents), inputs)


def test_a_bias_is_trained_beside_frozen_taps():
    x, weight, bias = leaves((9, 6), (6, 4), (6,))
    args = x, weight.detach(), bias, documents_of([5, 4])
    assert_same(causal_conv1d(*args), causal_conv1d_ref(*args), (x, bias))


def test_convolution_step_continues_the_row():
    x, weight, bias = (t.detach() for t in leaves((9, 6), (6, 4), (6,)))
    whole = causal_conv1d(x, weight, bias, documents_of([2, 7]))
    state = conv_state(torch.cat([x[:1], x[2:8]]), 4, documents_of([1, 6]))
    y, after = causal_conv1d_step(torch.stack([x[1], x[8]]), state, weight, bias)
    torch.testing.assert_close(y, torch.stack([whole[1], whole[8]]))
    torch.testing.assert_close(after, conv_state(x, 4, documents_of([2, 7])))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_equals_softmax_within_documents(lengths):
    tokens = sum(lengths)
    inputs = q, k, v = leaves((tokens, 4, 8), (tokens, 2, 8), (tokens, 2, 8))
    documents = documents_of(lengths)
    assert_same(varlen_attention(q, k, v, documents), varlen_attention_ref(q, k, v, documents), inputs)


def test_attention_step_equals_the_last_row():
    q, k, v = (t.detach() for t in leaves((9, 4, 8), (9, 2, 8), (9, 2, 8)))
    whole = varlen_attention(q, k, v, documents_of([2, 7]))
    padded = [torch.nn.utils.rnn.pad_sequence(list(t.split([2, 7])), batch_first=True, padding_value=7.0) for t in (k, v)]
    y = attention_step(torch.stack([q[1], q[8]]), *padded, torch.tensor([2, 7]))
    torch.testing.assert_close(y, torch.stack([whole[1], whole[8]]))


@pytest.mark.parametrize("chosen", [[[0, 2], [2, 4], [0, 4]], [[3, 3 - 1]] * 3])
def test_grouped_experts_equal_one_token_at_a_time(chosen):
    inputs = x, up, down = leaves((3, 8), (5, 6, 8), (5, 8, 6))
    routing = Routing(torch.tensor(chosen), torch.rand(3, 2, generator=torch.Generator().manual_seed(1)))
    sent = dispatch(routing, 5)
    hidden = grouped_linear(sent.sorted_rows(x), up, sent.ends_E).relu().square()
    assert_same(sent.combine(grouped_linear(hidden, down, sent.ends_E)), experts_ref(x, up, down, routing), inputs)


def test_router_chooses_by_bias_and_weighs_by_score():
    x, weight = torch.eye(4), torch.arange(16.0).reshape(4, 4) / 16
    bias = torch.tensor([9.0, 0.0, 0.0, 8.0])
    routing = route(x, weight, bias, top_k=2, num_groups=1, top_groups=1, normalize=True, scale=2.0)
    assert (routing.experts_TK.sort(-1).values == torch.tensor([0, 3])).all()
    torch.testing.assert_close(routing.weights_TK.sum(-1), torch.full((4,), 2.0))


def test_router_keeps_a_correction_bias_that_bf16_would_erase():
    bias = torch.tensor([64.0, 64.05, 64.1, 64.15])
    routing = route(
        torch.zeros(1, 3, dtype=torch.bfloat16), torch.zeros(4, 3), bias, top_k=1, num_groups=1, top_groups=1, normalize=False, scale=1.0
    )
    assert routing.experts_TK.item() == 3
    assert len(bias.bfloat16().unique()) == 1


def test_loss_over_supervised_positions_equals_the_full_one():
    (hidden,) = leaves((21, 8))
    targets = torch.randint(0, 13, (21,), generator=torch.Generator().manual_seed(3))
    targets[::3] = -100
    head = Head(8, 13, bias=False)
    ours = linear_cross_entropy(head, hidden, targets, chunk_tokens=4)
    with torch.no_grad():
        assert linear_cross_entropy(head, hidden, targets, chunk_tokens=4).item() == pytest.approx(ours.item(), rel=1e-6)
    reference = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    assert_same(ours, reference, (hidden, head.weight))


def test_a_row_without_targets_costs_nothing_and_has_a_gradient():
    (hidden,) = leaves((5, 8))
    loss = linear_cross_entropy(torch.nn.Identity(), hidden, torch.full((5,), -100))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.abs().sum() == 0
