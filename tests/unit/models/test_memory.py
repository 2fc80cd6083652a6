"""What a block keeps for the backward of LoRA on a frozen bf16 base: bytes per token, counted; no fp32 copy of an activation among them."""

from __future__ import annotations

import pytest
import torch
from kept_bytes import kept_for_backward
from random_models import make

from nemotune.lora import apply_lora
from nemotune.models import load_model
from nemotune.ops.documents import Documents
from nemotune.recipe import Lora

RANK = 8
ADAPTED = ("attention", "mamba", "mlp", "shared_experts", "experts")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf")
    make("hybrid").save_pretrained(directory)
    model = load_model(directory, dtype="bfloat16")
    apply_lora(model, Lora(rank=RANK, targets=ADAPTED))
    return model.train()


def saved(block, tokens):
    """Bytes of distinct memory that one forward of the block keeps, its parameters and the documents' places apart."""
    documents = Documents(torch.tensor([0, tokens], dtype=torch.int32))
    x = torch.randn(tokens, 32, dtype=torch.bfloat16, requires_grad=True)
    return kept_for_backward(block, x, documents)


def saved_per_token(block):
    """By the difference of two lengths: weights cast for the call and states count nothing."""
    return (saved(block, 512) - saved(block, 256)) / 256


def bytes_of(config, block_type):
    """Per token: bf16 values that the backward needs, each once, and fp32 or int64 values per head or expert."""
    c, D, bf16, fp32 = config, config.hidden_size, 2, 4
    if block_type == "mlp":
        return bf16 * (2 * D + RANK + 2 * c.intermediate_size + RANK)  # x, normed x; relu and its square
    if block_type == "attention":
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        on_cpu = queries * bf16 + c.num_attention_heads * fp32  # a document's output and normaliser, before they are laid end to end
        return bf16 * (2 * D + 4 * RANK + 2 * queries + 2 * keys) + on_cpu
    if block_type == "mamba":
        inner, heads = c.mamba_inner_size, c.mamba_num_heads
        projected = inner + c.conv_dim + heads  # z, what is convolved, and dt
        return (
            bf16 * (2 * D + RANK + projected + c.conv_dim + inner + inner + RANK) + 3 * fp32 * heads
        )  # dt before and after softplus and clamp
    experts, shared = c.num_experts_per_tok, c.moe_shared_expert_intermediate_size
    sent = experts * (2 * D + 2 * RANK + 2 * c.moe_intermediate_size)  # rows of x, relu, its square, what comes back
    routing = c.n_routed_experts * fp32 + fp32 + experts * (2 * fp32 + 3 * 8)  # scores, their sum; weights, and places
    return bf16 * (2 * D + sent + 2 * RANK + 2 * shared) + routing


@pytest.mark.parametrize("index, block_type", list(enumerate(["mamba", "moe", "attention", "mlp"])))
def test_a_block_keeps_what_its_backward_needs_once(model, index, block_type):
    block = model.blocks[index]
    assert block.block_type == block_type
    assert saved_per_token(block) <= bytes_of(model.config, block_type)
