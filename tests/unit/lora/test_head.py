"""LoRA on the output head, which sees the supervised tokens alone, a chunk of them at a time: its dropout is still that of each token."""

from __future__ import annotations

import pytest
import torch
from random_models import make
from torch.nn import functional as F

from nemotune.lora import apply_lora
from nemotune.lora.dropout import dropout
from nemotune.models import base, load_model
from nemotune.recipe import Lora
from nemotune.train.activation import set_activation_checkpointing

TOKENS = torch.randint(0, 96, (31,), generator=torch.Generator().manual_seed(1))
TARGETS = torch.where(torch.arange(31) % 3 == 0, -100, TOKENS.roll(-1))
BORDERS = torch.tensor([0, 12, 31], dtype=torch.int32)
PLACES = {"documents_T": torch.tensor([4] * 12 + [9] * 19), "positions_T": torch.cat([torch.arange(12), torch.arange(19)])}


@pytest.fixture(params=["llama", "hybrid", "llama_tied"])
def adapted(request, tmp_path):
    """A model with LoRA on its head and on one block type, dropout on."""
    make(request.param).save_pretrained(tmp_path / "hf")
    model = load_model(tmp_path / "hf", dtype="float32")
    keys = apply_lora(model, Lora(rank=4, alpha=8, dropout=0.4, targets=("lm_head", "attention")))
    with torch.no_grad():
        model.lm_head.lora_B.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    keys.set(seed=5, step=2, **PLACES)
    return model.train(), keys


@pytest.mark.parametrize("logits_per_chunk", [96 * 4, 96 * 1000])
def test_the_loss_and_its_gradients_are_those_of_each_tokens_own_mask(adapted, logits_per_chunk, monkeypatch):
    monkeypatch.setattr(base, "LOGITS_PER_CHUNK", {False: logits_per_chunk})
    model, keys = adapted
    head = model.lm_head
    hidden = model(TOKENS, BORDERS)
    loss = model.loss(hidden, TARGETS)
    loss.backward()

    A, B = (p.detach().clone().requires_grad_() for p in (head.lora_A, head.lora_B))
    x, rows = hidden.detach(), TARGETS != -100
    dropped = dropout(x, keys.of_tokens, probability=0.4, module=head.module_id)  # of every token, then the supervised ones
    logits = F.linear(x, head.base.weight) + 2.0 * F.linear(F.linear(dropped, A), B)
    expected = F.cross_entropy(logits[rows], TARGETS[rows], reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(head.lora_A.grad, A.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.lora_B.grad, B.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.loss(hidden, TARGETS), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_blocks_that_are_computed_again_after_the_head_keep_their_masks(adapted, mode):
    model, _ = adapted
    gradients = []
    for chosen in ("none", mode):
        set_activation_checkpointing(model, chosen)
        model.zero_grad()
        model.loss(model(TOKENS, BORDERS), TARGETS).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()), msg=name)
