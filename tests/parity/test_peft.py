"""Our adapters in PEFT on transformers' model: the same logits, experts included."""

from __future__ import annotations

import json
import re
from collections import defaultdict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from random_models import make, relative, with_our_dt_limits
from safetensors.torch import load_file, save_file

from nemotune.errors import CheckpointError
from nemotune.export.adapters.opened import open_adapter
from nemotune.export.adapters.peft_files import plan_for_peft, plan_for_vllm
from nemotune.export.stream import write
from nemotune.lora import LoRAEmbedding, apply_lora, load_adapter, lora_modules, save_adapter
from nemotune.models import load_model
from nemotune.recipe import Lora, Train
from nemotune.train.optim import make_optimizer

TOKENS = torch.randint(0, 96, (29,), generator=torch.Generator().manual_seed(1))
BORDERS = torch.tensor([0, 29], dtype=torch.int32)


def adapted(directory, lora):
    """Our model with an adapter whose every value matters."""
    model = load_model(directory, dtype="float32")
    apply_lora(model, lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, layer in lora_modules(model):
            (layer.lora_embedding_A if isinstance(layer, LoRAEmbedding) else layer.lora_B).normal_(0, 0.2, generator=generator)
            if lora.dora:
                layer.lora_magnitude_vector.mul_(torch.rand(layer.out_features, generator=generator) + 0.5)
    return model.eval()


CASES = {
    "default": ("hybrid", Lora(rank=4, alpha=8)),
    "rslora": ("hybrid", Lora(rank=4, alpha=8, rslora=True)),
    "experts_alone": ("hybrid", Lora(rank=3, alpha=8, targets=("experts",))),
    "one_projection_of_experts": ("hybrid", Lora(rank=3, alpha=8, targets=("experts.down_proj", "q_proj"))),
    "latent": ("latent", Lora(rank=4, alpha=8)),
    "lm_head": ("hybrid", Lora(rank=4, alpha=8, targets=("lm_head", "mlp"))),
    "llama": ("llama", Lora(rank=4, alpha=8, dropout=0.1)),
    "ranks": ("hybrid", Lora(rank=4, alpha=8, rank_pattern={"q_proj": 2, "attention": 6, "experts.up_proj": 3, "shared_experts": 5})),
    "alphas": (
        "hybrid",
        Lora(rank=4, alpha=8, rslora=True, rank_pattern={"experts": 2}, alpha_pattern={"experts.down_proj": 4, "mamba": 20}),
    ),
    "dora": (
        "hybrid",
        Lora(rank=4, alpha=8, dora=True, rank_pattern={"q_proj": 9}, targets=("attention", "in_proj", "mlp", "shared_experts")),
    ),
    "dora_rslora_head": ("llama", Lora(rank=4, alpha=8, rslora=True, dora=True, targets=("attention", "mlp", "lm_head"))),
    "dora_biased": ("llama_biased", Lora(rank=4, alpha=8, dora=True)),
    "embeddings": ("hybrid", Lora(rank=4, alpha=8, targets=("embeddings", "attention"), alpha_pattern={"embeddings": 2})),
    "embeddings_alone": ("llama", Lora(rank=4, alpha=2, rslora=True, dropout=0.1, targets=("embeddings",))),
    "embeddings_and_head": ("llama", Lora(rank=4, alpha=8, rank_pattern={"embed_tokens": 7}, targets=("embed_tokens", "lm_head"))),
}


@pytest.mark.parametrize("case", CASES)
def test_a_saved_adapter_gives_the_same_logits_in_peft(case, tmp_path):
    variant, lora = CASES[case]
    theirs = make(variant)
    theirs.save_pretrained(tmp_path / "hf")
    ours = adapted(tmp_path / "hf", lora)
    assert save_adapter(ours, tmp_path / "adapter", lora, base="hf") == []
    expected = ours.logits(ours(TOKENS, BORDERS))
    plain = theirs(TOKENS[None], use_cache=False).logits[0]
    peft = with_our_dt_limits(PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval())
    got = peft(TOKENS[None], use_cache=False).logits[0]
    assert relative(expected, plain) > 0.05, "the adapter must matter"
    assert relative(got, expected) < 1e-4
    loaded = {n for n, p in peft.named_parameters() if "lora_" in n}
    assert len(loaded) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


THEIRS = {
    "last_parts_of_names": ("hybrid", dict(target_modules=["q_proj", "up_proj", "in_proj"])),
    "last_parts_with_experts": ("hybrid", dict(target_modules=["q_proj"], target_parameters=["experts.up_proj", "experts.down_proj"])),
    "one_projection_of_experts": ("latent", dict(target_modules=["fc1_latent_proj"], target_parameters=["experts.up_proj"])),
    "one_projection_of_latent_experts": ("latent", dict(target_modules=["q_proj"], target_parameters=["experts.down_proj"])),
    "pattern": ("hybrid", dict(target_modules=r".*\.(q|o|down)_proj", use_rslora=True)),
    "all_linear_but": ("llama", dict(target_modules="all-linear", exclude_modules=["layers.1.mlp.up_proj", "k_proj"])),
    "lm_head": ("llama", dict(target_modules=["lm_head", "v_proj"])),
    "lm_head_tied": ("llama_tied", dict(target_modules=["lm_head", "v_proj"])),
    "embeddings": ("hybrid", dict(target_modules=["embeddings", "q_proj"], rank_pattern={"embeddings": 2})),
    "embeddings_of_llama": ("llama", dict(target_modules=r".*\.(embed_tokens|v_proj)")),
    "dora": ("llama_biased", dict(target_modules=["q_proj", "up_proj"], use_dora=True, alpha_pattern={"q_proj": 3})),
    "patterns": ("hybrid", dict(
        target_modules=["q_proj", "k_proj", "in_proj", "up_proj"], target_parameters=["experts.up_proj", "experts.down_proj"],
        rank_pattern={r"layers\.\d.*up_proj": 5, "k_proj": 2}, alpha_pattern={"model.layers.2.mixer.q_proj": 20, "experts.down_proj": 3},
    )),
}  # fmt: skip


@pytest.mark.parametrize("case", THEIRS)
def test_an_adapter_that_peft_saved_gives_the_same_logits_here(case, tmp_path):
    variant, settings = THEIRS[case]
    make(variant).save_pretrained(tmp_path / "hf")
    theirs = get_peft_model(make(variant), LoraConfig(r=3, lora_alpha=8, init_lora_weights=False, **settings)).eval()
    theirs.save_pretrained(tmp_path / "adapter")  # with the base's weight beside lm_head and embed_tokens
    ours = load_model(tmp_path / "hf", dtype="float32")
    plain = ours.logits(ours(TOKENS, BORDERS))
    load_adapter(ours, tmp_path / "adapter")
    expected = with_our_dt_limits(theirs)(TOKENS[None], use_cache=False).logits[0]
    assert relative(plain, expected) > 0.05, "the adapter must matter"
    assert relative(ours.eval().logits(ours(TOKENS, BORDERS)), expected) < 1e-4


def test_a_weight_beside_the_adapter_that_is_not_the_bases_is_refused(tmp_path):
    make("llama").to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    theirs = get_peft_model(make("llama").to(torch.bfloat16), LoraConfig(r=3, target_modules=["embed_tokens", "lm_head"]))
    theirs.save_pretrained(tmp_path / "adapter")
    shard = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(shard)
    copied = sorted(key for key in tensors if key.endswith(".base_layer.weight"))
    assert copied == ["base_model.model.lm_head.base_layer.weight", "base_model.model.model.embed_tokens.base_layer.weight"]
    load_adapter(load_model(tmp_path / "hf", dtype="float32"), tmp_path / "adapter")
    tensors[copied[1]][5, 5] *= 2
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens: adapter_model\.safetensors has a weight of it that is not the base's"):
        load_adapter(load_model(tmp_path / "hf", dtype="float32"), tmp_path / "adapter")


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_survives_saving_and_loading(case, tmp_path):
    variant, lora = CASES[case]
    make(variant).save_pretrained(tmp_path / "hf")
    ours = adapted(tmp_path / "hf", lora)
    save_adapter(ours, tmp_path / "adapter", lora, base="hf")
    again = load_model(tmp_path / "hf", dtype="float32")
    load_adapter(again, tmp_path / "adapter")
    before, after = dict(lora_modules(ours)), dict(lora_modules(again))
    assert before.keys() == after.keys()
    for name, layer in before.items():
        assert all(torch.equal(p, getattr(after[name], which)) for which, p in layer.named_parameters(recurse=False)), name
    assert torch.equal(ours(TOKENS, BORDERS), again.eval()(TOKENS, BORDERS))


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("case", ["dora", "dora_biased"])
def test_dora_has_the_output_and_the_gradients_of_peft(case, drops, tmp_path):
    """Module by module on one input; with dropout PEFT's is told which features ours lost."""
    variant, lora = CASES[case]
    theirs = make(variant)
    theirs.save_pretrained(tmp_path / "hf")
    ours = adapted(tmp_path / "hf", lora.model_copy(update={"dropout": 0.3 if drops else 0.0})).train()
    save_adapter(ours, tmp_path / "adapter", lora, base="hf")
    peft = PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True).train()
    modules = {name.removeprefix("base_model.model."): module for name, module in peft.named_modules()}
    aliases = {ours: alias for alias, ours in ours.aliases.items()}
    for name, layer in lora_modules(ours):
        spelled = next((alias + name.removeprefix(prefix) for prefix, alias in aliases.items() if name.startswith(prefix)), name)
        other = modules[spelled]
        x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(5))
        weights = torch.randn(7, layer.out_features, generator=torch.Generator().manual_seed(6))
        if drops:
            layer.keys.set(seed=0, step=0, documents_T=torch.zeros(7), positions_T=torch.arange(7))
            mask = layer._dropped(torch.ones_like(x), None)
            other.lora_dropout["default"] = Times(mask)
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = layer(one), other(two)
        (y * weights).sum().backward()
        (expected * weights).sum().backward()
        pairs = {
            "y": (y, expected), "x": (one.grad, two.grad), "A": (layer.lora_A.grad, other.lora_A["default"].weight.grad),
            "B": (layer.lora_B.grad, other.lora_B["default"].weight.grad),
            "m": (layer.lora_magnitude_vector.grad, other.lora_magnitude_vector["default"].weight.grad),
        }  # fmt: skip
        for which, (got, reference) in pairs.items():
            assert relative(got, reference) < 1e-5, (name, which)


class Times(torch.nn.Module):
    """In place of a dropout: multiply by this."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


def test_out_proj_trains_and_the_save_says_where_it_will_not_load(tmp_path):
    make("hybrid").save_pretrained(tmp_path / "hf")
    lora = Lora(rank=4, alpha=8, targets=("mamba",))
    ours = adapted(tmp_path / "hf", lora)
    notes = save_adapter(ours, tmp_path / "adapter", lora, base="hf")
    assert "out_proj" in notes[0] and "PEFT" in notes[0]
    ours(TOKENS, BORDERS).sum().backward()
    assert all(layer.lora_B.grad.abs().max() > 0 for name, layer in lora_modules(ours) if name.endswith("out_proj"))
    load_adapter(load_model(tmp_path / "hf", dtype="float32"), tmp_path / "adapter")


def test_an_adapter_with_experts_tells_peft_no_dropout(tmp_path):
    make("hybrid").save_pretrained(tmp_path / "hf")
    lora = Lora(rank=4, alpha=8, dropout=0.1)
    save_adapter(adapted(tmp_path / "hf", lora), tmp_path / "adapter", lora, base="hf")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.0 and config["target_parameters"]


def test_loraplus_groups_are_those_of_peft(tmp_path):
    """As sets of parameters by rate and decay: PEFT decays A and B alike with what it is given, and so it does with the rate of embeddings."""
    make("llama").save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="float32")
    apply_lora(model, Lora(rank=2, targets=("attention", "mlp", "embeddings")))
    ours = make_optimizer(
        {name: p for name, p in model.named_parameters() if p.requires_grad}, Train(learning_rate=0.01, weight_decay=0.1), plus_ratio=16
    )
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens"]
    peft = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=modules))
    theirs = create_loraplus_optimizer(
        peft, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, loraplus_lr_embedding=0.01
    )

    def groups(optimizer, model):
        names = {id(p): re.sub(r"^base_model\.model\.|\.default(\.weight)?$", "", name) for name, p in model.named_parameters()}
        found = defaultdict(set)
        for group in optimizer.param_groups:
            found[group["lr"], group["weight_decay"]] |= {names[id(p)] for p in group["params"]}
        return {settings: held for settings, held in found.items() if held}

    assert groups(ours, model) == groups(theirs, peft) and len(groups(ours, model)) == 2


@pytest.mark.parametrize("case", ["last_parts_with_experts", "one_projection_of_latent_experts", "patterns"])
def test_an_adapter_that_peft_saved_gives_the_same_logits_after_vllm_s_form(case, tmp_path):
    """Its fused experts to one tensor each and back: PEFT's own values again, and the same logits here."""
    variant, settings = THEIRS[case]
    make(variant).save_pretrained(tmp_path / "hf")
    theirs = get_peft_model(make(variant), LoraConfig(r=3, lora_alpha=8, init_lora_weights=False, **settings)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    write(plan_for_vllm(open_adapter(tmp_path / "adapter", tmp_path / "hf")), tmp_path / "vllm")
    write(plan_for_peft(open_adapter(tmp_path / "vllm", tmp_path / "hf")), tmp_path / "back")
    if case != "patterns":  # whose ranks become one
        before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "back"))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    expected = with_our_dt_limits(theirs)(TOKENS[None], use_cache=False).logits[0]
    for form in ("vllm", "back"):
        ours = load_model(tmp_path / "hf", dtype="float32")
        load_adapter(ours, tmp_path / form)
        assert relative(ours.eval().logits(ours(TOKENS, BORDERS)), expected) < 1e-4
