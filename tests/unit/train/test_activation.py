"""Which results selective checkpointing keeps."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import CheckpointPolicy

from nemotune.ops.attention import flash_attention
from nemotune.train.activation import _keep_products


def test_flash_attention_is_kept_and_elementwise_work_is_not():
    flash_attention()
    assert _keep_products(None, torch.ops.torch_attn._varlen_attn.default) == CheckpointPolicy.MUST_SAVE
    assert _keep_products(None, torch.ops.aten.mm.default) == CheckpointPolicy.MUST_SAVE
    assert _keep_products(None, torch.ops.aten.silu.default) == CheckpointPolicy.PREFER_RECOMPUTE
