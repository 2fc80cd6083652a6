"""The loss and its gradient belong to the global batch, however it is cut."""

from __future__ import annotations

import pytest
import torch
from random_models import relative
from torch.utils._python_dispatch import TorchDispatchMode
from toy_split import ToySplit

from nemotune.data.loader import Loader, batches
from nemotune.distributed.gradients import gradient_norm
from nemotune.lora import apply_lora, lora_modules
from nemotune.models import load_model
from nemotune.recipe import Lora
from nemotune.train.activation import set_activation_checkpointing
from nemotune.train.step import accumulate, update, validation_loss

LENGTHS = [9, 14, 6, 21, 8, 11, 5, 17]


def adapted(hybrid_dir, *, dropout=0.0, dtype="float32"):
    model = load_model(hybrid_dir, dtype=dtype)
    keys = apply_lora(
        model, Lora(rank=4, alpha=8, dropout=dropout, targets=("attention", "mamba", "mlp", "shared_experts", "experts", "lm_head"))
    )
    with torch.no_grad():
        for _, layer in lora_modules(model):
            layer.lora_B.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model.train(), keys


def gradients(hybrid_dir, *, micro, packs=None, dropout=0.0, checkpointing="none", step=0):
    """(loss, gradient of every adapter tensor) of one global batch of all documents."""
    model, keys = adapted(hybrid_dir, dropout=dropout)
    set_activation_checkpointing(model, checkpointing)
    split = ToySplit(LENGTHS, packs=packs)
    loader = Loader(split, global_batch_size=len(split.packs), micro_batch_size=micro, seed=0)
    result = accumulate(model, loader.step(0), keys=keys, seed=3, step=step)
    return result.loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(one, other, tolerance=1e-5):
    assert abs(one[0] - other[0]) < tolerance * one[0]
    assert one[1].keys() == other[1].keys() and one[1]
    for name, gradient in one[1].items():
        assert relative(other[1][name], gradient) < tolerance, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("micro, packs", [(1, None), (4, None), (1, [[0, 3], [1, 2, 4], [5], [7, 6]]), (2, [[7, 0], [3, 1], [2, 4, 5, 6]])])
def test_micro_batch_and_packing_change_nothing(hybrid_dir, micro, packs, dropout):
    assert_same_gradients(gradients(hybrid_dir, micro=8, dropout=dropout), gradients(hybrid_dir, micro=micro, packs=packs, dropout=dropout))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(hybrid_dir, mode):
    plain = gradients(hybrid_dir, micro=2, dropout=0.3)
    again = gradients(hybrid_dir, micro=2, dropout=0.3, checkpointing=mode)
    assert plain[0] == again[0]
    assert_same_gradients(plain, again, tolerance=1e-6)


def test_dropout_differs_by_step_and_repeats_within_one(hybrid_dir):
    assert gradients(hybrid_dir, micro=4, dropout=0.3)[0] == gradients(hybrid_dir, micro=4, dropout=0.3)[0]
    assert gradients(hybrid_dir, micro=4, dropout=0.3)[0] != gradients(hybrid_dir, micro=4, dropout=0.3, step=1)[0]


def test_a_small_step_moves_fp32_weights_that_bf16_would_keep(hybrid_dir):
    model = load_model(hybrid_dir, dtype="bfloat16", trainable=True)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in parameters.values())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1.0)
    split = ToySplit(LENGTHS)
    accumulate(model, Loader(split, global_batch_size=8, micro_batch_size=8, seed=0).step(0), keys=None, seed=0, step=0)
    reached = {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
    update(parameters.values(), optimizer, learning_rate=5e-6, grad_norm=gradient_norm(parameters.values()), max_grad_norm=1.0)
    moved = sum(int((parameters[name] != before[name]).sum()) for name in reached)
    kept_in_bf16 = sum(int((parameters[name].bfloat16() == before[name].bfloat16()).sum()) for name in reached)
    total = sum(before[name].numel() for name in reached)
    assert moved > 0.5 * total
    assert kept_in_bf16 > 0.8 * total


class Waits(TorchDispatchMode):
    """Counts what waits for the meta device, which stands for any: values that are read there, copies to it that block."""

    def __init__(self):
        super().__init__()
        self.read, self.copied = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self.read += 1
            return 1.0
        if function == torch.ops.aten._to_copy.default and not args[0].is_meta and kwargs.get("device") == torch.device("meta"):
            self.copied += not kwargs.get("non_blocking")
        return function(*args, **kwargs)


@pytest.mark.parametrize("micro", [1, 4, 8])
def test_a_step_and_a_validation_wait_for_the_device_once(hybrid_dir, micro):
    model, keys = adapted(hybrid_dir, dropout=0.3, dtype="bfloat16")  # the only one that grouped_mm has there
    model.to("meta")
    split = ToySplit(LENGTHS)
    step = Loader(split, global_batch_size=8, micro_batch_size=micro, seed=0).step(0)
    assert len(step) == 8 // micro
    with Waits() as waits:
        accumulate(model, step, keys=keys, seed=0, step=0)
    assert (waits.read, waits.copied) == (1, 0)
    with Waits() as waits:
        validation_loss(model, batches(split, max_tokens=micro))
    assert (waits.read, waits.copied) == (1, 0)
