"""LoRA computes what its equation says, and its dropout is a function of the token alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nemotune.lora.dropout import DropoutKeys, dropout
from nemotune.lora.layers import LoRAExperts, LoRALinear, expert_keys
from nemotune.models.layers import GroupedLinear, Linear
from nemotune.ops.experts import Routing, dispatch
from nemotune.ops.grouped import grouped_linear
from nemotune.recipe import Lora

ROUTING = Routing(torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]]), torch.ones(4, 2))


def drawn(layer, scale=0.3):
    """The layer with a B that matters."""
    with torch.no_grad():
        layer.lora_B.normal_(0, scale, generator=torch.Generator().manual_seed(7))
    return layer


def linear(lora=None, *, name="q_proj", seed=0, dtype=torch.float32, keys=None):
    torch.manual_seed(1)
    return LoRALinear(
        Linear(12, 10, bias=False, dtype=dtype), lora or Lora(rank=4, alpha=8), name=name, keys=keys or DropoutKeys(), seed=seed
    )


def experts(lora=None, *, keys=None):
    torch.manual_seed(1)
    base = GroupedLinear(3, 12, 10)
    torch.nn.init.normal_(base.weight)
    return LoRAExperts(base, lora or Lora(rank=4, alpha=8), name="experts.up_proj", keys=keys or DropoutKeys(), seed=0)


def same(one, other):
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("rslora, scale", [(False, 8 / 4), (True, 8 / 4**0.5)])
def test_output_and_both_gradients_equal_the_dense_update(rslora, scale):
    layer, x, weights = drawn(linear(Lora(rank=4, alpha=8, rslora=rslora))), torch.randn(7, 12), torch.randn(7, 10)
    (layer(x) * weights).sum().backward()
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    dense = F.linear(x, layer.base.weight + scale * B @ A)
    (dense * weights).sum().backward()
    same(layer(x), dense)
    same(layer.lora_A.grad, A.grad)
    same(layer.lora_B.grad, B.grad)
    assert layer.base.weight.grad is None


def test_experts_output_and_both_gradients_equal_the_dense_update():
    layer, sent, x, weights = drawn(experts()), dispatch(ROUTING, 3), torch.randn(8, 12), torch.randn(8, 10)
    (layer(x, sent) * weights).sum().backward()
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    dense = grouped_linear(x, layer.base.weight + 2.0 * B @ A, sent.ends_E)
    (dense * weights).sum().backward()
    same(layer(x, sent), dense)
    same(layer.lora_A.grad, A.grad)
    same(layer.lora_B.grad, B.grad)


def test_a_new_adapter_changes_nothing_and_stays_fp32_on_a_bf16_base():
    layer, x = linear(dtype=torch.bfloat16), torch.randn(7, 12).bfloat16()
    assert torch.equal(layer(x), layer.base(x)) and layer(x).dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


def test_the_start_depends_on_seed_and_name_alone():
    start = linear().lora_A.detach()
    assert torch.equal(start, linear().lora_A)
    assert not torch.equal(start, linear(seed=1).lora_A)
    assert not torch.equal(start, linear(name="k_proj").lora_A)
    assert start.abs().max() <= 12**-0.5 and start.std() == pytest.approx((12**-0.5) / 3**0.5, rel=0.2)


def keyed(*, seed=0, step=0, document=0, positions=64):
    keys = DropoutKeys()
    keys.set(seed=seed, step=step, documents_T=torch.full((positions,), document), positions_T=torch.arange(positions))
    return keys


def kept(keys, *, probability=0.3, module=1, features=30):
    return dropout(torch.ones(len(keys.of_tokens), features), keys.of_tokens, probability=probability, module=module) > 0


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"document": 1}])
def test_dropout_differs_with_each_part_of_its_key(change):
    assert torch.equal(kept(keyed()), kept(keyed()))
    agree = (kept(keyed()) == kept(keyed(**change))).float().mean()
    assert agree == pytest.approx(0.7**2 + 0.3**2, abs=0.05)


def test_dropout_differs_between_positions_features_and_modules():
    mask = kept(keyed())
    assert (mask[1:] == mask[:-1]).float().mean() == pytest.approx(0.58, abs=0.05)
    assert (mask[:, 1:] == mask[:, :-1]).float().mean() == pytest.approx(0.58, abs=0.05)
    assert (mask == kept(keyed(), module=2)).float().mean() == pytest.approx(0.58, abs=0.05)


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.9])
def test_dropout_keeps_the_mean_and_has_its_rate(probability):
    keys = keyed(positions=400)
    x = dropout(torch.ones(400, 250), keys.of_tokens, probability=probability, module=5)
    deviation = (probability * (1 - probability) / x.numel()) ** 0.5
    assert (x == 0).float().mean() == pytest.approx(probability, abs=5 * deviation)
    assert x.mean() == pytest.approx(1.0, abs=5 * deviation / (1 - probability))


def test_a_token_loses_other_features_in_each_of_its_experts():
    keys = keyed(positions=4).of_tokens
    sent = dispatch(ROUTING, 3)
    by_row = expert_keys(keys, sent)
    assert len(by_row.unique()) == len(by_row) == 8
    assert not set(by_row.tolist()) & set(keys.tolist())


def test_experts_add_the_update_of_dropped_rows_to_the_base_of_whole_ones():
    layer, sent, x = drawn(experts(Lora(rank=4, alpha=8, dropout=0.5), keys=keyed(positions=4))), dispatch(ROUTING, 3), torch.randn(8, 12)
    dropped = dropout(x, expert_keys(layer.keys.of_tokens, sent), probability=0.5, module=layer.module_id)
    update = 2.0 * layer.lora_B @ layer.lora_A
    by_row = [layer.base.weight[e] @ row + update[e] @ left for row, left, e in zip(x, dropped, sent.experts_M, strict=True)]
    same(layer(x, sent), torch.stack(by_row))
    whole = layer.eval()(x, sent)
    assert (layer.train()(x, sent) - whole).abs().max() > 0.1 * whole.abs().max()


def test_dropout_is_off_in_evaluation():
    layer, x = drawn(linear(Lora(rank=4, alpha=8, dropout=0.5))), torch.randn(7, 12)
    plain = drawn(linear())(x)
    assert torch.equal(layer.eval()(x), plain)
    layer.keys.set(seed=0, step=0, documents_T=torch.zeros(7), positions_T=torch.arange(7))
    assert not torch.equal(layer.train()(x), plain)


def kept_for_backward(layer, x):
    """The tensors of x's shape that a forward keeps, each memory once."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        layer(x)
    return [tensor for tensor in kept.values() if tensor.shape == x.shape]


def test_an_input_is_kept_once_and_for_the_adapter_alone():
    layer, x = drawn(linear(dtype=torch.bfloat16)), torch.randn(64, 12).bfloat16().requires_grad_()
    assert kept_for_backward(layer.base, x) == []
    assert [tensor.data_ptr() for tensor in kept_for_backward(layer, x)] == [x.data_ptr()]


def test_dropout_keeps_what_is_left_and_one_byte_a_feature():
    layer = drawn(linear(Lora(rank=4, alpha=8, dropout=0.5), dtype=torch.bfloat16, keys=keyed()))
    x = torch.randn(64, 12).bfloat16().requires_grad_()
    assert sorted(tensor.itemsize for tensor in kept_for_backward(layer, x)) == [1, 2]


def test_what_dropout_leaves_in_bf16_is_scaled_and_rounded_once():
    x, keys = torch.randn(64, 12).bfloat16(), keyed().of_tokens
    left = dropout(x, keys, probability=0.05, module=1)
    exact = (x.double() / (1 - round(0.05 * 65536) / 65536)).bfloat16()
    assert torch.equal(left[left != 0], exact[left != 0]) and (left != 0).any()
