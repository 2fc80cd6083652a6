"""Which results selective checkpointing keeps, and that no kind of it changes a gradient."""

from __future__ import annotations

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy

from nemotune.lora import apply_lora, lora_modules
from nemotune.models import load_model
from nemotune.ops.attention import flash_attention
from nemotune.recipe import Lora
from nemotune.train import activation
from nemotune.train.activation import _keep_products, set_activation_checkpointing


def test_products_and_flash_attention_are_kept_and_cheap_work_is_not():
    flash_attention()
    assert _keep_products(None, torch.ops.torch_attn._varlen_attn.default) == CheckpointPolicy.MUST_SAVE
    wide, narrow = torch.empty(8, 64), torch.empty(8, 2)
    assert _keep_products(None, torch.ops.aten.mm.default, wide, torch.empty(64, 96)) == CheckpointPolicy.MUST_SAVE
    assert _keep_products(None, torch.ops.aten.addmm.default, wide, narrow, torch.empty(2, 64)) == CheckpointPolicy.PREFER_RECOMPUTE
    assert _keep_products(None, torch.ops.aten.silu.default) == CheckpointPolicy.PREFER_RECOMPUTE


def test_gradients_of_a_bf16_model_are_the_same_bits_whatever_is_kept(hybrid_dir):
    """Also where a block's own parts compute themselves again in the backward, as they do in 16 bits."""
    model = load_model(hybrid_dir, dtype="bfloat16").train()
    apply_lora(model, Lora(rank=4, alpha=8, targets=("mamba", "experts", "attention", "mlp")))
    for _, layer in lora_modules(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(1))
    tokens, borders = torch.arange(31), torch.tensor([0, 20, 31], dtype=torch.int32)
    gradients = {}
    for mode in ("none", "selective", "full", "offload"):
        set_activation_checkpointing(model, mode)
        model.loss(model(tokens, borders), tokens).backward()
        gradients[mode] = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
    assert gradients["none"]
    for mode in ("selective", "full", "offload"):
        assert all(torch.equal(ours, kept) for ours, kept in zip(gradients[mode], gradients["none"], strict=True))


def test_offload_keeps_the_inputs_of_blocks_on_the_host_and_nothing_else(hybrid_dir, monkeypatch):
    """Counted at PyTorch's hooks: each input goes out once and comes back once; no weight does, adapters cast to bf16 included."""
    packed, unpacked = [], []

    class Counting(save_on_cpu):
        def __init__(self, **options):
            super().__init__(**options)
            pack, unpack = self.pack_hook, self.unpack_hook

            def counting_pack(tensor):
                held = pack(tensor)
                packed.append((tuple(tensor.shape), tensor.dtype, held[1].data_ptr() != tensor.data_ptr()))
                return held

            self.pack_hook, self.unpack_hook = counting_pack, lambda held: unpacked.append(held) or unpack(held)

    monkeypatch.setattr(activation, "save_on_cpu", Counting)
    model = load_model(hybrid_dir, dtype="bfloat16", quantization="nf4").train()
    apply_lora(model, Lora(rank=4, alpha=8, targets=("mamba", "experts", "attention", "mlp")))
    set_activation_checkpointing(model, "offload")
    tokens, borders = torch.arange(31), torch.tensor([0, 20, 31], dtype=torch.int32)
    model.loss(model(tokens, borders), tokens).backward()
    inputs = [found for found in packed if 0 not in found[0]]
    assert inputs == [((31, model.config.hidden_size), torch.bfloat16, True)] * len(model.blocks)
    assert len(unpacked) == len(packed)
    with torch.no_grad():
        packed.clear()
        model(tokens, borders)
    assert packed == []
