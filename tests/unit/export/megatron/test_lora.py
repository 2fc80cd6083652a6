"""LoRA checkpoints of Megatron-Bridge and adapters of ours: no value changes on the way there and back, every tensor has a place or is named."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from random_models import make

from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.export.adapters.opened import open_adapter
from nemotune.export.megatron import fitting
from nemotune.export.megatron.checkpoint import open_megatron
from nemotune.export.megatron.lora import read_lora
from nemotune.export.megatron.lora_files import plan_lora
from nemotune.export.stream import Plan, write
from nemotune.export.tuned import Tuned, open_tuned
from nemotune.lora import apply_lora, lora_modules, save_adapter
from nemotune.lora.layers import scale
from nemotune.models import build_model, load_model, read_config
from nemotune.recipe import Lora

PLAIN = Lora(rank=2, alpha=6)
PATTERNS = Lora(
    rank=2, alpha=4, targets=("attention", "experts", "latent"), rank_pattern={"experts": 4, "o_proj": 1}, alpha_pattern={"o_proj": 1}
)


def trained(path: Path, variant: str, lora: Lora) -> Tuned:
    """A base and an adapter of random values on it."""
    make(variant).bfloat16().save_pretrained(path / "base")
    model = load_model(path / "base", dtype="float32")
    apply_lora(model, lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, layer in lora_modules(model):
            layer.lora_B.normal_(0, 0.2, generator=generator)
    save_adapter(model, path / "adapter", lora, base="base")
    return open_tuned(path / "base", path / "adapter")


def planned(path: Path) -> Plan[int]:
    """What is written for that adapter."""
    return plan_lora(open_adapter(path / "adapter", path / "base"))


@pytest.mark.parametrize(
    ("variant", "lora"),
    [
        ("hybrid", PLAIN),
        ("four_ways", PATTERNS),
        ("llama", PLAIN),
        ("llama", Lora(rank=2, alpha=4, targets=("q_proj", "v_proj", "up_proj"))),
    ],
)
def test_an_adapter_there_and_back_is_the_same_bit_for_bit_and_merges_to_the_same_bytes(tmp_path, variant, lora):
    tuned = trained(tmp_path, variant, lora)
    assert write(planned(tmp_path), tmp_path / "megatron") == 2 * len(tuned.adapter.pairs)
    back = open_tuned(tmp_path / "base", tmp_path / "megatron", read=read_lora)
    more = back.adapter.pairs.keys() - tuned.adapter.pairs.keys()  # k_proj beside q_proj and v_proj, which share the fused A
    assert back.adapter.pairs.keys() >= tuned.adapter.pairs.keys() and not any(back.adapter.pairs[name][1].any() for name in more)
    for name, (A, B) in tuned.adapter.pairs.items():
        theirs = back.adapter.settings[name]
        factor = (tuned.adapter.settings[name].alpha / tuned.adapter.settings[name].rank) / (theirs.alpha / theirs.rank)
        assert torch.equal(back.adapter.pairs[name][0], A) and torch.equal(back.adapter.pairs[name][1], B * factor), name
    assert all(torch.equal(back.read(name), tuned.read(name)) for name in tuned.infos)


def test_a_scale_that_no_alpha_says_to_the_last_bit_is_kept_to_its_rounding(tmp_path):
    tuned = trained(tmp_path, "llama", Lora(rank=5, alpha=16, rslora=True))
    write(planned(tmp_path), tmp_path / "megatron")
    back = open_tuned(tmp_path / "base", tmp_path / "megatron", read=read_lora)
    for name, its in tuned.adapter.settings.items():
        assert scale(back.adapter.settings[name]) == pytest.approx(scale(its), rel=1e-15)


def test_an_adapter_is_written_some_rows_at_a_time(tmp_path, monkeypatch):
    trained(tmp_path, "hybrid", PLAIN)
    write(planned(tmp_path), tmp_path / "whole")
    monkeypatch.setattr(fitting, "SLAB_NUMEL", 50)
    write(planned(tmp_path), tmp_path / "cut")
    whole, cut = (open_megatron(tmp_path / name).stored for name in ("whole", "cut"))
    assert max(len(tensor.chunks) for tensor in cut.tensors.values()) > 3
    assert all(torch.equal(cut.read(name), whole.read(name)) for name in whole.tensors)


def test_three_projections_stand_one_below_the_other_and_add_what_each_of_them_did(tmp_path):
    """As Megatron-Bridge computes it: alpha / dim times B A, of the fused weight."""
    tuned = trained(tmp_path, "hybrid", PLAIN)
    write(planned(tmp_path), tmp_path / "megatron")
    checkpoint = open_megatron(tmp_path / "megatron")
    peft = checkpoint.run_config["peft"]
    assert (peft["dim"], peft["alpha"], peft["share_expert_adapters"]) == (6, 18, False)
    assert set(peft["target_modules"]) == {"in_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    A, B = (checkpoint.stored.read(f"decoder.layers.2.self_attention.linear_qkv.adapter.linear_{which}.weight") for which in ("in", "out"))
    ours = {p: tuned.adapter.pairs[f"backbone.layers.2.mixer.{p}_proj"] for p in "qkv"}
    assert torch.equal(A, torch.cat([ours[p][0] for p in "qkv"]))
    added = (peft["alpha"] / peft["dim"] * B.double() @ A.double()).view(2, 4, 8, 32)  # per group two queries, a key, a value
    deltas = {p: (3 * b.double() @ a.double()).view(-1, 8, 32) for p, (a, b) in ours.items()}
    assert (
        torch.equal(added[:, :2].flatten(0, 1), deltas["q"])
        and torch.equal(added[:, 2], deltas["k"])
        and torch.equal(added[:, 3], deltas["v"])
    )
    assert checkpoint.stored.tensors["decoder.layers.1.mlp.experts.experts.linear_fc2.adapter.linear_out.weight"].shape == (6, 32, 6)
    in_proj = {name.rpartition(".")[2] for name in checkpoint.stored.tensors if "layers.0.mixer.in_proj.adapter.linear_out" in name}
    assert in_proj == {"z", "x", "B", "C", "dt"} and checkpoint.is_lora


def megatron_lora(path: Path, tensors: dict[str, torch.Tensor], **peft: object) -> Path:
    """A checkpoint of these tensors, as its own tools write one."""
    dcp.save(tensors, checkpoint_id=path, planner=dcp.DefaultSavePlanner(flatten_state_dict=False), no_dist=True)
    settings = {"_target_": "megatron.bridge.peft.lora.LoRA", "alpha": 8, "dim": 2, **peft}
    (path / "run_config.yaml").write_text(yaml.safe_dump({"peft": settings}))
    return path


@pytest.fixture
def hybrid(tmp_path):
    make("hybrid").config.save_pretrained(tmp_path / "config")
    return build_model(read_config(tmp_path / "config"))


EXPERTS = "decoder.layers.1.mlp.experts.experts.linear_fc1.adapter"
QKV = "decoder.layers.2.self_attention.linear_qkv.adapter"


def test_a_fused_adapter_has_one_a_and_rows_of_b_by_groups(hybrid, tmp_path):
    A, B = torch.randn(2, 32).bfloat16(), torch.randn(64, 2).bfloat16()
    found = read_lora(megatron_lora(tmp_path / "lora", {f"{QKV}.linear_in.weight": A, f"{QKV}.linear_out.weight": B}), hybrid)
    q, k, v = (found.pairs[f"backbone.layers.2.mixer.{p}_proj"] for p in "qkv")
    groups = B.view(2, 4, 8, 2)
    assert torch.equal(q[1], groups[:, :2].reshape(32, 2)) and torch.equal(k[1], groups[:, 2].reshape(16, 2))
    assert torch.equal(v[1], groups[:, 3].reshape(16, 2)) and all(torch.equal(pair[0], A) for pair in (q, k, v))
    assert (found.lora.rank, found.lora.alpha, found.dtype) == (2, 8, "BF16")


@pytest.mark.parametrize("each", [True, False], ids=["each_expert", "all_experts_share"])
def test_adapters_of_experts_may_be_three_or_two_dimensional(hybrid, tmp_path, each):
    A, B = (torch.randn(6, *shape) if each else torch.randn(shape) for shape in ((2, 32), (24, 2)))
    found = read_lora(megatron_lora(tmp_path / "lora", {f"{EXPERTS}.linear_in.weight": A, f"{EXPERTS}.linear_out.weight": B}), hybrid)
    its_A, its_B = found.pairs["backbone.layers.1.mixer.experts.up_proj"]
    assert torch.equal(its_A, A.expand(6, 2, 32)) and torch.equal(its_B, B.expand(6, 24, 2))


def test_canonical_lora_has_an_adapter_for_each_projection_of_layers_that_are_stacked(tmp_path):
    make("llama").config.save_pretrained(tmp_path / "config")
    model = build_model(read_config(tmp_path / "config"))
    sizes = {"self_attention.linear_qkv.adapter.adapter_q": 64, "self_attention.linear_qkv.adapter.adapter_v": 32}
    sizes |= {f"mlp.linear_fc1.adapter.adapter_{which}": 64 for which in ("gate", "up")}
    tensors = {f"decoder.layers.{name}.linear_in.weight": torch.randn(3, 2, 32) for name in sizes}
    tensors |= {f"decoder.layers.{name}.linear_out.weight": torch.randn(3, out, 2) for name, out in sizes.items()}
    path = megatron_lora(tmp_path / "lora", tensors, _target_="megatron.bridge.peft.canonical_lora.CanonicalLoRA")
    found = read_lora(path, model)
    assert {name.rpartition(".")[2] for name in found.pairs} == {"q_proj", "v_proj", "gate_proj", "up_proj"} and len(found.pairs) == 12
    A, B = found.pairs["model.layers.2.mlp.gate_proj"]
    assert torch.equal(A, tensors["decoder.layers.mlp.linear_fc1.adapter.adapter_gate.linear_in.weight"][2])
    assert torch.equal(B, tensors["decoder.layers.mlp.linear_fc1.adapter.adapter_gate.linear_out.weight"][2])


@pytest.mark.parametrize(
    ("tensors", "peft", "kind", "error"),
    [
        ({f"{QKV}.linear_in.weight": (2, 32)}, {}, CheckpointError, r"linear_qkv\.adapter\.linear_out\.weight: missing"),
        ({f"{QKV}.linear_in.weight": (2, 32), f"{QKV}.linear_out.weight": (60, 2)}, {}, CheckpointError, r"got 60 rows, expected 64"),
        ({f"{QKV}.linear_in.weight": (2, 32), f"{QKV}.linear_out.weight": (64, 3)}, {}, CheckpointError, r"q_proj: got B of \(32, 3\), expected \(32, 2\)"),
        ({"decoder.layers.1.mlp.router.adapter.linear_in.weight": (2, 32)}, {}, CheckpointError, r"router\.adapter\.linear_in\.weight: has no place"),
        ({f"{EXPERTS}.linear_in.weight": (5, 2, 32), f"{EXPERTS}.linear_out.weight": (24, 2)}, {}, CheckpointError, "got 5 experts, expected 6"),
        ({f"{QKV}.linear_in.weight": (2, 32)}, {"_target_": "megatron.bridge.peft.dora.DoRA"}, UnsupportedError, "got DoRA, expected one of LoRA"),
        ({f"{QKV}.linear_in.weight": (2, 32)}, {"alpha": None}, CheckpointError, r"says no peft\.alpha"),
        *(({f"{QKV}.linear_in.weight": (2, 32)}, {"alpha": alpha}, CheckpointError, "over 0") for alpha in (0, -4, math.inf, math.nan, True)),
        *(({f"{QKV}.linear_in.weight": (2, 32)}, {"dropout": dropout}, CheckpointError, r"peft\.dropout: got") for dropout in ("x", 2, math.nan)),
    ],
)  # fmt: skip
def test_what_has_no_place_or_does_not_fit_is_named(hybrid, tmp_path, tensors, peft, kind, error):
    path = megatron_lora(tmp_path / "lora", {name: torch.ones(shape) for name, shape in tensors.items()}, **peft)
    with pytest.raises(kind, match=error):
        read_lora(path, hybrid)


def test_what_megatron_bridge_has_no_place_for_is_refused_by_name(tmp_path):
    for lora, error in (
        (Lora(rank=2, alpha=4, targets=("attention",), alpha_pattern={"o_proj": 3}), r"layers\.2\.mixer\.o_proj: is scaled by 1\.5, others by 2"),
        (Lora(rank=2, targets=("attention",), dora=True), r"lora\.dora: Megatron's checkpoints of DoRA are not written"),
        (Lora(rank=2, targets=("attention", "lm_head")), "lm_head: Megatron-Bridge's LoRA has no place for its adapter"),
    ):  # fmt: skip
        trained(tmp_path / error[:9], "hybrid", lora)
        with pytest.raises(UnsupportedError, match=error):
            planned(tmp_path / error[:9])
