"""What a GPU does otherwise than a CPU: attention and experts in one kernel each, 16-bit factors with fp32 products, nothing waited for."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from random_models import make, relative

from nemotune.lora import apply_lora, lora_modules
from nemotune.models import load_model
from nemotune.ops import conv as conv_module
from nemotune.ops import ssd as ssd_module
from nemotune.ops.attention import attention_per_document, has_flash, varlen_attention, varlen_attention_ref
from nemotune.ops.conv import causal_conv1d, causal_conv1d_ref
from nemotune.ops.documents import Documents
from nemotune.ops.experts import Routing, dispatch
from nemotune.ops.grouped import grouped_linear
from nemotune.ops.kernels import uses_triton, why_not_triton
from nemotune.ops.norm import gated_group_rms_norm, rms_norm
from nemotune.ops.ssd import ssd
from nemotune.ops.ssd_ref import ssd_ref
from nemotune.recipe import Lora

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LENGTHS = [1, 130, 7, 64, 257, 3]
BF16_UNIT = 2**-7  # two results that are rounded once, from sums in another order, lie within a unit of the last place


def documents_of(lengths, device=DEVICE):
    return Documents(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device))


def drawn(*shape, seed, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype).requires_grad_()


def with_gradients(y, inputs):
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    return [y, *torch.autograd.grad(y, inputs, grad)]


def on(device, function, *inputs):
    """Result and gradients of `function` there, brought back to the CPU."""
    inputs = [t.detach().to(device).requires_grad_(t.is_floating_point()) for t in inputs]
    return [t.cpu() for t in with_gradients(function(*inputs), inputs)]


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(8, 2, 128), (4, 4, 64), (32, 2, 128)])
def test_flash_is_as_exact_as_the_definition_in_bf16(heads, kv_heads, head_dim):
    """FlashAttention's own measure: at most twice the error of the plain computation in the same dtype, thrice for gradients.

    Those of keys and values may be bf16 sums over the heads that share them, a rounding each.
    """
    tokens, documents = sum(LENGTHS), documents_of(LENGTHS)
    q, k, v = (drawn(tokens, n, head_dim, seed=n + i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    assert has_flash(q)
    flash = with_gradients(varlen_attention(q, k, v, documents), [q, k, v])
    plain = with_gradients(varlen_attention_ref(q, k, v, documents), [q, k, v])
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    exact = with_gradients(varlen_attention_ref(*wide, documents), wide)
    for ours, theirs, reference, factor in zip(flash[:2], plain, exact, (2, 3), strict=False):
        assert (ours - reference).abs().max() <= factor * (theirs - reference).abs().max()
    for ours, reference in zip(flash[2:], exact[2:], strict=True):
        assert relative(ours, reference) <= (1 + heads // kv_heads) * 2**-8


def test_flash_equals_one_call_per_document():
    documents = documents_of(LENGTHS)
    q, k, v = (drawn(sum(LENGTHS), n, 64, seed=n) for n in (8, 2, 4))
    v = v[:, :2]
    assert relative(varlen_attention(q, k, v, documents), attention_per_document(q, k, v, documents)) < 2 * BF16_UNIT


def test_a_changed_document_leaves_the_bits_of_the_others():
    documents = documents_of(LENGTHS)
    q, k, v = (drawn(sum(LENGTHS), n, 64, seed=n).detach() for n in (8, 2, 2))
    before = varlen_attention(q, k, v, documents)
    for t in (q, k, v):
        t[1:131] = 3.0
    after = varlen_attention(q, k, v, documents)
    assert torch.equal(before[:1], after[:1]) and torch.equal(before[131:], after[131:]) and not torch.equal(before, after)


@pytest.mark.parametrize("in_features, out_features", [(64, 3), (3, 64), (64, 4), (64, 12), (64, 16), (20, 36)])
def test_grouped_products_of_any_rank_equal_each_experts(in_features, out_features):
    ends = torch.tensor([100, 100, 107, 260, 260], dtype=torch.int32, device=DEVICE)
    x, weight = drawn(260, in_features, seed=1), drawn(5, out_features, in_features, seed=2)
    starts = [0, *ends.tolist()]
    one_by_one = torch.cat([F.linear(x[a:b], w) for a, b, w in zip(starts, starts[1:], weight, strict=False)])
    grouped = with_gradients(grouped_linear(x, weight, ends), [x, weight])
    for ours, theirs in zip(grouped, with_gradients(one_by_one, [x, weight]), strict=True):
        assert relative(ours, theirs) <= BF16_UNIT
    assert not grouped[2][[1, 4]].any(), "experts without rows"


def experts_of(x, weights, up, down):
    sent = dispatch(
        Routing(torch.rand(400, 32, generator=torch.Generator().manual_seed(4)).topk(6).indices.sort(-1).values.to(x.device), weights), 32
    )
    return sent.combine(grouped_linear(grouped_linear(sent.sorted_rows(x), up, sent.ends_E).relu().square(), down, sent.ends_E))


def test_experts_repeat_to_the_bit_and_equal_the_cpus():
    inputs = [drawn(400, 64, seed=1), drawn(400, 6, seed=2, dtype=torch.float32), drawn(32, 48, 64, seed=3), drawn(32, 64, 48, seed=4)]
    first, second, cpu = on(DEVICE, experts_of, *inputs), on(DEVICE, experts_of, *inputs), on("cpu", experts_of, *inputs)
    for ours, again, theirs in zip(first, second, cpu, strict=True):
        assert torch.equal(ours, again)
        assert relative(ours, theirs) <= 4 * BF16_UNIT  # four roundings, one after another


def scan_inputs(tokens, dtype):
    x, B, C = (F.silu(drawn(tokens, *shape, seed=i)).to(dtype) for i, shape in enumerate(((8, 64), (2, 128), (2, 128))))
    dt = F.softplus(drawn(tokens, 8, seed=5, dtype=torch.float32) - 3)
    return x, dt, -1 - 15 * drawn(8, seed=6, dtype=torch.float32).sigmoid(), B, C, drawn(8, seed=7, dtype=torch.float32)


def relative_rms(got, exact):
    return ((got.double() - exact.double()).square().mean() / exact.double().square().mean()).sqrt().item()


def test_a_bf16_scan_is_as_exact_as_on_the_cpu():
    inputs = [t.detach() for t in scan_inputs(sum(LENGTHS), torch.bfloat16)]
    exact, _ = ssd_ref(*(t.float() for t in inputs), documents_of(LENGTHS))
    there, _ = ssd(*inputs, documents_of(LENGTHS), chunk_size=128)
    here, _ = ssd(*(t.cpu() for t in inputs), documents_of(LENGTHS, "cpu"), chunk_size=128)
    assert relative_rms(there, exact) <= 1.01 * relative_rms(here.to(DEVICE), exact)  # the same roundings; 1 % is chance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2**-5)])
def test_gradients_of_the_scan_equal_the_cpus(dtype, tolerance):
    """fp32: sums of 128 products in another order. bf16: gradients are added up in bf16, three roundings each."""
    inputs = [t.detach() for t in scan_inputs(sum(LENGTHS), dtype)]
    there, here = (
        on(device, lambda *args, device=device: ssd(*args, documents_of(LENGTHS, device), chunk_size=32)[0], *inputs)
        for device in (DEVICE, "cpu")
    )
    for ours, theirs in zip(there, here, strict=True):
        assert relative(ours.float(), theirs.float()) <= tolerance


def test_triton_computes_here_unless_told_otherwise():
    assert why_not_triton(torch.device(DEVICE, 0)) is None or "NEMOTUNE_KERNELS" in os.environ


triton_computes = pytest.mark.skipif(
    not (torch.cuda.is_available() and uses_triton(torch.device(DEVICE, 0))), reason="Triton's kernels are not used here"
)


@pytest.fixture
def torch_computes(monkeypatch):
    """PyTorch's path on the GPU: a call with it inside."""

    def called(function, *inputs):
        with monkeypatch.context() as patch:
            for module in (conv_module, ssd_module):
                patch.setattr(module, "uses_triton", lambda device: False)
            return on(DEVICE, function, *inputs)

    return called


def scan(x, dt, A, B, C, D):
    return ssd(x, dt, A, B, C, D, documents_of(LENGTHS, x.device), chunk_size=128)[0]


def padded_scan_inputs(dtype, *, heads, groups, head_dim, state):
    """x, B and C are slices of one row, as the model has them: nothing lies side by side."""
    tokens, inner = sum(LENGTHS), heads * head_dim
    row = F.silu(drawn(tokens, inner + 2 * groups * state + 24, seed=1)).to(dtype)
    x, B, C, _ = row.split([inner, groups * state, groups * state, 24], dim=-1)
    dt = F.softplus(drawn(tokens, heads, seed=5, dtype=torch.float32) - 3)
    A, D = -1 - 15 * drawn(heads, seed=6, dtype=torch.float32).sigmoid(), drawn(heads, seed=7, dtype=torch.float32)
    return [t.detach() for t in (x.unflatten(-1, (heads, -1)), dt, A, B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1)), D)]


SHAPES = [
    dict(heads=8, groups=2, head_dim=64, state=128),
    dict(heads=6, groups=1, head_dim=80, state=128),
    dict(heads=2, groups=2, head_dim=20, state=12),
]


@triton_computes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_scans_as_the_recurrence_in_fp32(shape):
    """1e-4: sums of up to 256 products in another order, and the GPU's exp."""
    inputs = padded_scan_inputs(torch.float32, **shape)
    exact = on("cpu", lambda *args: ssd_ref(*args, documents_of(LENGTHS, "cpu"))[0], *inputs)
    for ours, reference in zip(on(DEVICE, scan, *inputs), exact, strict=True):
        assert relative(ours, reference) <= 1e-4


@triton_computes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_adds_the_rounding_of_its_factors_to_a_bf16_scan(shape, torch_computes):
    """As in tests/parity/triton/test_triton_ssd.py: sqrt(2) of the error of a path that rounds no factor."""
    inputs = padded_scan_inputs(torch.bfloat16, **shape)
    exact = on("cpu", lambda *args: ssd_ref(*args, documents_of(LENGTHS, "cpu"))[0], *(t.float() for t in inputs))
    for ours, other, reference in zip(on(DEVICE, scan, *inputs), torch_computes(scan, *inputs), exact, strict=True):
        assert ours.dtype == other.dtype and relative_rms(ours, reference) <= 2**0.5 * relative_rms(other, reference)


@triton_computes
def test_triton_repeats_to_the_bit_and_keeps_documents_apart():
    inputs = padded_scan_inputs(torch.bfloat16, **SHAPES[0])
    first, second = on(DEVICE, scan, *inputs), on(DEVICE, scan, *inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    inputs[3] = inputs[3].clone()
    inputs[3][1:131] = torch.nan  # B
    changed = on(DEVICE, scan, *inputs)
    for before, after in zip(first[:3], changed[:3], strict=True):  # y, dx, ddt
        assert torch.equal(before[:1], after[:1]) and torch.equal(before[131:], after[131:]) and after[1:131].isnan().any()


@triton_computes
def test_triton_gives_the_states_at_the_ends_with_their_gradients():
    inputs = padded_scan_inputs(torch.float32, **SHAPES[0])
    states = on(DEVICE, lambda *args: ssd(*args, documents_of(LENGTHS), chunk_size=128, final_states=True)[1], *inputs[:4], *inputs[4:])
    exact = on("cpu", lambda *args: ssd_ref(*args, documents_of(LENGTHS, "cpu"))[1] + 0 * args[4].sum() + 0 * args[5].sum(), *inputs)
    for ours, reference in zip(states, exact, strict=True):
        assert (ours - reference).abs().max() <= 1e-4 * reference.abs().max()


@triton_computes
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2 * BF16_UNIT)])
def test_triton_convolves_as_the_definition(dtype, tolerance):
    row, taps, bias = (
        drawn(sum(LENGTHS), 200, seed=1, dtype=dtype),
        drawn(150, 4, seed=2, dtype=torch.float32),
        drawn(150, seed=3, dtype=torch.float32),
    )

    def over_a_slice(function, row, taps, bias):
        return function(row[:, 8:158], taps, bias, documents_of(LENGTHS, row.device))

    ours = on(DEVICE, partial(over_a_slice, causal_conv1d), row, taps, bias)
    exact = on("cpu", partial(over_a_slice, causal_conv1d_ref), row.float(), taps, bias)
    for got, reference in zip(ours, exact, strict=True):
        assert relative(got.float(), reference) <= tolerance


def test_norms_and_the_convolution_equal_the_cpus():
    x, gate, weight, taps, bias = (drawn(*shape, seed=i) for i, shape in enumerate(((464, 64), (464, 64), (64,), (64, 4), (64,))))
    cases = [
        (lambda x, weight: rms_norm(x, weight, 1e-5), (x, weight)),
        (lambda x, gate, weight: gated_group_rms_norm(x, gate, weight, num_groups=4, eps=1e-5), (x, gate, weight)),
        (lambda x, taps, bias: causal_conv1d(x, taps, bias, documents_of([400, 64], x.device)), (x, taps, bias)),
    ]
    for function, inputs in cases:
        for ours, theirs in zip(on(DEVICE, function, *inputs), on("cpu", function, *inputs), strict=True):
            assert relative(ours.float(), theirs.float()) <= 2 * BF16_UNIT


@pytest.fixture
def models(tmp_path):
    """The same adapted model on both devices."""

    def adapted(device, dtype):
        model = load_model(tmp_path, dtype=dtype, device=device)
        apply_lora(model, Lora(rank=4, alpha=8, targets=("attention", "mamba", "mlp", "shared_experts", "experts")))
        for _, layer in lora_modules(model):
            with torch.no_grad():
                layer.lora_B.copy_(0.2 * torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(3)))
        return model.train()

    make("hybrid").save_pretrained(tmp_path)
    return lambda dtype: (adapted(DEVICE, dtype), adapted("cpu", dtype))


def test_an_adapted_model_in_fp32_equals_the_cpus(models):
    tokens, borders = torch.arange(60) % 96, torch.tensor([0, 13, 14, 60], dtype=torch.int32)
    hidden, gradients = [], []
    with torch.backends.cudnn.flags(allow_tf32=False):
        for model in models("float32"):
            hidden.append(model(tokens.to(model.device), borders.to(model.device)))
            model.loss(hidden[-1], tokens.to(model.device)).backward()
            gradients.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    assert relative(hidden[0].cpu(), hidden[1]) < 1e-4
    for name, theirs in gradients[1].items():
        assert relative(gradients[0][name], theirs) < 1e-3, name


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="the grouped kernel is of Hopper and later"
)
def test_blocks_never_wait_for_the_device(models):
    """In bf16, forward and backward, once the borders are read: any synchronising call raises."""
    model, _ = models("bfloat16")
    documents = Documents(torch.tensor([0, 13, 14, 60], dtype=torch.int32, device=DEVICE))
    hidden = torch.randn(60, 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x = hidden
        for block in model.blocks:
            x = block(x, documents, None)
        x.square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden.grad.isfinite().all()
