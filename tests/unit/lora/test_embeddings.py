"""LoRA on embeddings: PEFT's equation, start and names; refused where it would not be what it seems."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from random_models import make
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from nemotune.errors import UnsupportedError
from nemotune.export.tuned import open_tuned
from nemotune.lora import DropoutKeys, LoRAEmbedding, apply_lora, coverage, load_adapter, lora_modules, save_adapter
from nemotune.models import build_model, load_model, read_config
from nemotune.recipe import Lora

TOKENS = torch.tensor([3, 17, 3, 40, 0, 17, 3])
BORDERS = torch.tensor([0, 7], dtype=torch.int32)
NAMES = {"hybrid": "backbone.embeddings", "llama": "model.embed_tokens"}


def embedding(lora=None, *, dtype=torch.float32, seed=0):
    torch.manual_seed(1)
    return LoRAEmbedding(
        nn.Embedding(50, 12, dtype=dtype), lora or Lora(rank=4, alpha=8), name="embed_tokens", keys=DropoutKeys(), seed=seed
    )


def drawn(layer):
    """The layer with an A that matters."""
    nn.init.normal_(layer.lora_embedding_A, std=0.3, generator=torch.Generator().manual_seed(7))
    return layer


@pytest.mark.parametrize("rslora, scale", [(False, 8 / 4), (True, 8 / 4**0.5)])
def test_output_and_both_gradients_equal_the_dense_update(rslora, scale):
    layer, weights = drawn(embedding(Lora(rank=4, alpha=8, rslora=rslora))), torch.randn(7, 12)
    (layer(TOKENS) * weights).sum().backward()
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_embedding_A, layer.lora_embedding_B))
    dense = F.embedding(TOKENS, layer.base.weight + scale * (B @ A).T)
    (dense * weights).sum().backward()
    for got, expected in ((layer(TOKENS), dense), (layer.lora_embedding_A.grad, A.grad), (layer.lora_embedding_B.grad, B.grad)):
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert layer.base.weight.grad is None


def test_on_a_bf16_base_it_is_computed_in_fp32_and_rounded_once():
    layer = drawn(embedding(dtype=torch.bfloat16))
    assert layer.lora_embedding_A.dtype == layer.lora_embedding_B.dtype == torch.float32
    exact = layer.base.weight.double() + 2 * (layer.lora_embedding_B.double() @ layer.lora_embedding_A.double()).T
    everything = torch.arange(50)
    assert layer(everything).dtype == torch.bfloat16
    assert (layer(everything) != exact.bfloat16()).float().mean() < 0.005, "up to where fp32 and fp64 round to neighbours"
    in_bf16 = layer.base.weight + 2 * (layer.lora_embedding_A.bfloat16().T @ layer.lora_embedding_B.bfloat16().T)
    assert (in_bf16 != exact.bfloat16()).float().mean() > 0.1


def test_the_start_is_that_of_peft_and_depends_on_seed_and_name_alone():
    layer = embedding()
    assert not layer.lora_embedding_A.any() and torch.equal(layer(TOKENS), layer.base(TOKENS))
    assert torch.equal(layer.lora_embedding_B, embedding().lora_embedding_B)
    assert not torch.equal(layer.lora_embedding_B, embedding(seed=1).lora_embedding_B)
    wide = Lora(rank=400)
    theirs = get_peft_model(make("llama"), LoraConfig(r=400, target_modules=["embed_tokens"])).base_model.model.model.embed_tokens
    for drawn_B in (embedding(wide).lora_embedding_B, theirs.lora_embedding_B["default"]):
        B = drawn_B.detach()
        assert B.mean() == pytest.approx(0, abs=5 / B.numel() ** 0.5) and B.std() == pytest.approx(1, abs=5 / (2 * B.numel()) ** 0.5)
    assert not theirs.lora_embedding_A["default"].any()


def test_nothing_is_dropped_from_embeddings():
    layer = drawn(embedding(Lora(rank=4, alpha=8, dropout=0.5))).train()
    assert torch.equal(layer(TOKENS), drawn(embedding()).eval()(TOKENS))


@pytest.mark.parametrize("variant", NAMES)
def test_they_are_reached_by_block_type_and_by_name_and_not_by_default(variant, tmp_path):
    make(variant).save_pretrained(tmp_path)
    for targets in (("embeddings",), (NAMES[variant].rpartition(".")[2],), (NAMES[variant],)):
        model = load_model(tmp_path)
        apply_lora(model, Lora(rank=2, targets=targets))
        assert [name for name, _ in lora_modules(model)] == [NAMES[variant]]
        model(TOKENS, BORDERS)
        [row] = [row for row in coverage(model).rows if row.block_type == "embeddings"]
        assert (row.modules, row.adapted, row.parameters, row.bytes) == (1, 1, 2 * (96 + 32), 4 * 2 * (96 + 32))
        assert coverage(model).base_parameters == sum(p.numel() for p in load_model(tmp_path).parameters())
    apply_lora(model := load_model(tmp_path), Lora(rank=2))
    assert NAMES[variant] not in dict(lora_modules(model))


def test_patterns_give_them_rank_and_alpha(hybrid_dir):
    apply_lora(
        model := load_model(hybrid_dir),
        Lora(rank=2, targets=("embeddings", "mlp"), rank_pattern={"embeddings": 8}, alpha_pattern={"embeddings": 4}),
    )
    assert model.embeddings.lora_embedding_A.shape == (8, 96) and model.embeddings.scale == 0.5


def test_dora_on_embeddings_is_refused(hybrid_dir):
    with pytest.raises(UnsupportedError, match=r"^lora\.dora: .*not for experts or embeddings; use lora\.targets=\[attention\], or"):
        apply_lora(load_model(hybrid_dir), Lora(rank=2, dora=True, targets=("embeddings", "attention")))


def test_an_adapter_of_peft_with_dora_on_embeddings_is_refused(tmp_path):
    make("llama").save_pretrained(tmp_path / "hf")
    theirs = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], use_dora=True))
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(UnsupportedError, match=r"^lora\.dora: .*not for experts or embeddings"):
        load_adapter(load_model(tmp_path / "hf"), tmp_path / "adapter")


def test_embeddings_that_the_head_shares_are_refused_in_training_loading_and_merging(tmp_path):
    make("llama_tied").save_pretrained(tmp_path / "tied")
    make("llama").save_pretrained(tmp_path / "free")
    told = r"^lora\.targets: model\.embed_tokens is tied to the head \(tie_word_embeddings\).*leave embeddings out"
    for targets in (("embeddings",), ("attention", "embed_tokens")):
        with pytest.raises(UnsupportedError, match=told):
            apply_lora(build_model(read_config(tmp_path / "tied")), Lora(targets=targets))
    lora = Lora(rank=2, targets=("embeddings",))
    apply_lora(free := load_model(tmp_path / "free"), lora)
    save_adapter(free, tmp_path / "adapter", lora, base="free")
    with pytest.raises(UnsupportedError, match=told):
        load_adapter(load_model(tmp_path / "tied"), tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match=told):
        open_tuned(tmp_path / "tied", tmp_path / "adapter")


def test_they_are_saved_under_the_keys_of_peft(tmp_path):
    make("llama").save_pretrained(tmp_path / "hf")
    lora = Lora(rank=2, targets=("embeddings",))
    apply_lora(model := load_model(tmp_path / "hf"), lora)
    save_adapter(model, tmp_path / "ours", lora, base="hf")
    get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["embed_tokens"])).save_pretrained(
        tmp_path / "theirs", save_embedding_layers=False
    )
    ours, theirs = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
