"""The estimate of activations is the count of what blocks keep, under each checkpointing mode."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from kept_bytes import kept_for_backward
from random_models import make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from nemotune.lora import apply_lora
from nemotune.models import load_model
from nemotune.ops import grouped
from nemotune.ops.documents import Documents
from nemotune.plan.activations import kept_bytes
from nemotune.plan.cost import cost_line, estimate
from nemotune.recipe import Lora, Recipe
from nemotune.train.activation import _keep_products

DATA = os.environ.get("NEMOTUNE_TEST_DATA")
LINEAR = {"attention", "mamba", "mlp", "shared_experts"}
WIDTHS = {"bfloat16": 2, "float32": 4}
WIDE = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "mamba_head_dim", "moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size",
)  # fmt: skip


class Products(TorchDispatchMode):
    """Bytes of the outputs that selective checkpointing keeps."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if _keep_products(None, operator, *args) == CheckpointPolicy.MUST_SAVE:
            self.size += sum(t.nbytes for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
        return out


def counted(block, model, tokens, mode):
    """Bytes of one mode: values saved for the backward, or the block's input and the products of its forward."""
    documents = Documents(torch.tensor([0, tokens], dtype=torch.int32))
    x = torch.randn(tokens, model.config.hidden_size, dtype=model.compute_dtype, requires_grad=True)
    rope = model.rope(documents.positions_T)
    if mode == "none":
        return kept_for_backward(block, x, documents, rope)
    with Products() as products:
        block(x, documents, rope)
    return x.nbytes + products.size


@pytest.fixture(scope="module", params=["hybrid", "latent", "llama"])
def directory(request, tmp_path_factory):
    """Wide enough that ranks are few."""
    path = tmp_path_factory.mktemp(request.param)
    make(request.param).save_pretrained(path)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {key: 8 * raw[key] for key in WIDE if raw.get(key)}))
    return path


@pytest.mark.parametrize(
    "dtype, mode, experts",
    [("bfloat16", "none", False), ("bfloat16", "none", True), ("bfloat16", "selective", True), ("float32", "none", True)],
)
def test_what_blocks_keep_is_what_the_formula_says(directory, dtype, mode, experts, monkeypatch):
    """Tokens count by the difference of two lengths. Left out of the formula are ranks and, on a CPU, a copy of attention's output and
    the rows by which those of an expert are rounded up."""
    monkeypatch.setattr(grouped, "ROWS_AT_ONCE", 1)
    model = load_model(directory, dtype=dtype, random_seed=0)
    present = set(getattr(model.config, "block_types", ("attention", "mlp")))
    present |= {"shared_experts", *(["experts"] if experts else [])} if "moe" in present else set()
    trained = present & model.linear_blocks.keys()
    apply_lora(model, Lora(rank=1, targets=tuple(trained)))
    queries = model.config.num_attention_heads * model.config.head_dim * WIDTHS[dtype]
    for block in model.blocks:
        kind = getattr(block, "block_type", "llama")
        told = kept_bytes(model.config, kind, trained, mode=mode, width=WIDTHS[dtype])
        found = (counted(block, model, 96, mode) - counted(block, model, 48, mode)) / 48
        copied = queries if mode == "none" and kind in ("attention", "llama") else 0
        assert told == pytest.approx(found - copied, rel=0.04), kind


def recipe(path, *, mode="none", tokens=512, quantization="nf4", **changes):
    train = {"activation_checkpointing": mode, "optimizer": "adamw_8bit"}
    tree = {"name": "x", "model": {"path": str(path), "quantization": quantization}, "train": train}
    return Recipe.model_validate({**tree, "data": {"format": "chat", "train": "rows.jsonl", "sequence_length": tokens}, **changes})


def activation_bytes(path, **settings):
    return estimate(recipe(path, **settings)).activation_bytes


def test_checkpointing_and_fewer_tokens_take_less(directory):
    full, none = (activation_bytes(directory, mode=mode, tokens=8192) for mode in ("full", "none"))
    assert activation_bytes(directory, mode="full", tokens=4096) < full < none
    config = load_model(directory, random_seed=0).config
    for kind in set(getattr(config, "block_types", ["llama"])):
        full, selective, none = (
            kept_bytes(config, kind, {*LINEAR, "experts", "latent"}, mode=mode, width=2) for mode in ("full", "selective", "none")
        )
        assert full < selective <= none, kind


def test_offloaded_inputs_are_host_memory(directory):
    full, offload = (estimate(recipe(directory, mode=mode, tokens=8192)) for mode in ("full", "offload"))
    config = load_model(directory, random_seed=0).config
    assert offload.host_activation_bytes == 8192 * 2 * config.hidden_size * config.num_layers and full.host_activation_bytes == 0
    assert 0 < full.activation_bytes - offload.activation_bytes <= offload.host_activation_bytes
    assert cost_line(offload).endswith(" in host memory")


def test_an_nf4_weight_is_wide_while_it_is_used(directory):
    """Of the plan's parts, that which a wide base does not have."""
    assert activation_bytes(directory, mode="full") > activation_bytes(directory, mode="full", quantization="none")


def test_trained_weights_are_cast_for_their_products(directory):
    """Under `none` every cast stays for the backward: two bytes for each parameter of the blocks' matrices."""
    found = activation_bytes(directory, quantization="none", method="full", tokens=1)
    matrices = sum(p.numel() for block in load_model(directory, random_seed=0).blocks for p in block.parameters() if p.ndim > 1)
    assert found > 2 * matrices


def test_the_plan_tells_the_estimate_apart_from_what_is_held(directory):
    cost = estimate(recipe(directory))
    held, step = cost_line(cost).splitlines()
    assert held.startswith("Memory before activations: ") and cost.peak_bytes == cost.held.total_bytes + cost.activation_bytes
    assert step.startswith("A step of up to 512 tokens at a time takes an estimated ") and step.endswith(" at its peak")


@pytest.mark.skipif(not DATA, reason="NEMOTUNE_TEST_DATA is not set")
def test_nano_30b_at_four_bits_trains_on_24_gb(tmp_path):
    """Rank 16 on attention, mamba and shared_experts, rows of 4,096 tokens, full checkpointing: as lora.md says."""
    source = Path(str(DATA)) / "data/nemotron/configs/NVIDIA-Nemotron-3-Nano-30B-A3B.config.VERBATIM.json"
    (tmp_path / "config.json").write_bytes(source.read_bytes())
    lora = {"rank": 16, "targets": ["attention", "mamba", "shared_experts"]}
    cost = estimate(recipe(tmp_path, mode="full", tokens=4096, lora=lora))
    assert (cost.held.total_bytes, cost.activation_bytes) == (17_487_630_876, 3_487_072_256) and cost.peak_bytes < 24e9
    told = (Path(__file__).parents[3] / "docs" / "lora.md").read_text()
    assert f"{cost.held.total_bytes:,} bytes" in told
    assert f"an estimated {cost.activation_bytes / 1e9:.1f} GB more:\n{cost.peak_bytes / 1e9:.1f} GB at the peak" in told
