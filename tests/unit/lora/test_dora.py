"""DoRA computes its equation, with the norm as a constant, on any base; at the start it is the base."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from nemotune.lora.dropout import DropoutKeys
from nemotune.lora.layers import DoRALinear
from nemotune.lora.pairs import gains
from nemotune.models.layers import Linear
from nemotune.models.quantize import NF4Linear
from nemotune.ops.nf4 import dequantize
from nemotune.recipe import Lora
from nemotune.train.activation import _keep_products

LORA = Lora(rank=4, alpha=8, dora=True)


def plain(*, bias=False, dtype=torch.float32):
    torch.manual_seed(1)
    return Linear(64, 48, bias=bias, dtype=dtype)


def quantized(base):
    form = NF4Linear(base)
    form.fill(base.weight, None)
    return form


def dora(base, *, drawn=True, lora=LORA):
    layer = DoRALinear(base, lora, name="q_proj", keys=DropoutKeys(), seed=0)
    if drawn:
        with torch.no_grad():
            layer.lora_B.normal_(0, 0.3, generator=torch.Generator().manual_seed(7))
            layer.lora_magnitude_vector.mul_(torch.linspace(0.5, 2.0, 48))
    return layer


def same(one, other):
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nf4", [False, True])
def test_output_and_gradients_equal_the_dense_weight_with_a_constant_norm(bias, nf4):
    base = plain(bias=bias)
    layer, x, weights = dora(quantized(base) if nf4 else base), torch.randn(7, 64), torch.randn(7, 48)
    wide = dequantize(layer.base.quantized, layer.base.shape, torch.float32) if nf4 else base.weight.detach()
    x_ours, x_dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    (layer(x_ours) * weights).sum().backward()
    A, B, m = (p.detach().clone().requires_grad_() for p in layer.parameters(recurse=False))
    V = wide + 2.0 * B @ A
    dense = F.linear(x_dense, (m / V.detach().norm(dim=1))[:, None] * V, base.bias)
    (dense * weights).sum().backward()
    same(layer(x), dense)
    for ours, theirs in zip([x_ours, *layer.parameters(recurse=False)], [x_dense, A, B, m], strict=True):
        same(ours.grad, theirs.grad)


@pytest.mark.parametrize("nf4", [False, True])
def test_a_new_one_is_the_base_and_its_parts_are_fp32_on_bf16(nf4):
    base = plain(dtype=torch.bfloat16)
    layer, x = dora(quantized(base) if nf4 else base, drawn=False), torch.randn(7, 64).bfloat16()
    assert torch.equal(layer(x), layer.base(x)) and layer(x).dtype == torch.bfloat16
    assert {p.dtype for p in layer.parameters(recurse=False)} == {torch.float32}


def test_a_small_change_of_a_magnitude_reaches_a_bf16_output():
    """A gain of 1.003 is 1.0 in bf16, whose numbers above 1 are 1 / 128 apart: of outputs rounded once, about a third move."""
    layer, x = dora(plain(dtype=torch.bfloat16), drawn=False), torch.randn(50, 64).bfloat16()
    before = layer(x)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1.003)
    assert (layer(x) != before).float().mean() > 0.3


def test_a_row_of_zeros_stays_one():
    base = plain()
    with torch.no_grad():
        base.weight[3] = 0
    layer, x = dora(base, drawn=False), torch.randn(7, 64)
    layer(x).square().sum().backward()
    assert layer(x).isfinite().all() and not layer(x)[:, 3].any()
    assert all(p.grad.isfinite().all() for p in layer.parameters(recurse=False))


def test_a_row_of_zeros_stays_one_where_it_is_merged():
    updated = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert torch.equal(updated * gains(torch.tensor([0.5, 10.0]), updated), torch.tensor([[0, 0], [6, 8.0]], dtype=torch.float64))


def test_dropout_is_missing_from_all_but_the_base():
    layer, x = dora(plain(), lora=LORA.model_copy(update={"dropout": 0.5})), torch.randn(7, 64)
    layer.keys.set(seed=0, step=0, documents_T=torch.zeros(7), positions_T=torch.arange(7))
    dropped = layer._dropped(x, None)
    assert (dropped == 0).any()
    without = layer.eval()(dropped)
    same(layer.train()(x), layer.base(x) - layer.base(dropped) + without)


def test_selective_checkpointing_keeps_no_weight():
    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.kept = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if _keep_products(None, func, *args) == CheckpointPolicy.MUST_SAVE:
                self.kept.append(tuple(result.shape))
            return result

    with Shapes() as shapes:
        dora(plain())(torch.randn(7, 64))
    assert sorted(shapes.kept) == [(7, 4), (7, 48), (7, 48)]
