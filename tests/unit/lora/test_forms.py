"""Adapters of experts in either form: the same values, under every spelling of their keys; what is mixed, partial or foreign is refused by key."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotune.errors import CheckpointError
from nemotune.lora import apply_lora, lora_modules, save_adapter
from nemotune.lora.adapter import CONFIG, WEIGHTS, read_adapter
from nemotune.models import build_model, load_model, read_config
from nemotune.recipe import Lora

RANK, EXPERTS = 3, 6
FUSED = re.compile(r"(.*)\.experts(\.base_layer)?\.(lora_[AB])\.weight")


@pytest.fixture(scope="module")
def saved(hybrid_dir, tmp_path_factory):
    """An adapter with experts as PEFT has it, every value drawn at random."""
    directory = tmp_path_factory.mktemp("saved") / "adapter"
    lora = Lora(rank=RANK, alpha=6, targets=("attention", "mamba", "mlp", "shared_experts", "experts"))
    model = load_model(hybrid_dir, dtype="float32")
    apply_lora(model, lora)
    with torch.no_grad():
        for _, layer in lora_modules(model):
            for parameter in layer.parameters(recurse=False):
                parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    save_adapter(model, directory, lora, base="hf")
    return directory


def per_expert(tensors):
    """The tensors of a fused file one expert at a time: A lies as (expert, rank) x in, B as out x (rank, expert)."""
    split = {}
    for key, tensor in tensors.items():
        if (fused := FUSED.fullmatch(key)) is None:
            split[key] = tensor
            continue
        owner, nested, which = fused.groups()
        for expert in range(EXPERTS):
            rows = tensor[expert * RANK : (expert + 1) * RANK] if which == "lora_A" else tensor[:, expert::EXPERTS]
            split[f"{owner}.experts.{expert}.{'up_proj' if nested else 'down_proj'}.{which}.weight"] = rows.clone(
                memory_format=torch.contiguous_format
            )
    return split


def write(directory, tensors, **config):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / WEIGHTS)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "up_proj", "down_proj"]
    written = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": projections, **config}
    (directory / CONFIG).write_text(json.dumps(written))
    return directory


def read(directory, hybrid_dir):
    return read_adapter(directory, build_model(read_config(hybrid_dir)))


def assert_equal(got, expected):
    assert list(got.pairs) == list(expected.pairs) and got.settings == expected.settings
    for name in expected.pairs:
        assert all(torch.equal(*both) for both in zip(got.pairs[name], expected.pairs[name], strict=True)), name


SPELLINGS = [prefix + root for prefix in ("base_model.model.", "base_model.model.model.", "") for root in ("model.", "backbone.")]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("form", [per_expert, dict])
def test_both_forms_hold_the_same_values_under_every_spelling(saved, hybrid_dir, tmp_path, spelling, form):
    tensors = {key.replace("base_model.model.model.", spelling): tensor for key, tensor in form(load_file(saved / WEIGHTS)).items()}
    config = json.loads((saved / CONFIG).read_text()) if form is dict else {}
    assert_equal(read(write(tmp_path / "adapter", tensors, **config), hybrid_dir), read(saved, hybrid_dir))


def test_all_linear_reaches_experts_that_are_modules(saved, hybrid_dir, tmp_path):
    tensors = per_expert(load_file(saved / WEIGHTS))
    got = read(write(tmp_path / "adapter", tensors, target_modules="all-linear"), hybrid_dir)
    assert set(got.pairs) == set(read(saved, hybrid_dir).pairs)


def test_an_adapter_in_bf16_keeps_its_dtype(saved, hybrid_dir, tmp_path):
    tensors = {key: tensor.bfloat16() for key, tensor in per_expert(load_file(saved / WEIGHTS)).items()}
    got = read(write(tmp_path / "adapter", tensors), hybrid_dir)
    assert got.dtype == "BF16" and {tensor.dtype for pair in got.pairs.values() for tensor in pair} == {torch.bfloat16}
    tensors[next(iter(tensors))] = tensors[next(iter(tensors))].float()
    assert read(write(tmp_path / "adapter", tensors), hybrid_dir).dtype == "F32"


def test_an_expert_that_the_file_lacks_is_listed(saved, hybrid_dir, tmp_path):
    tensors = per_expert(load_file(saved / WEIGHTS))
    left = {key: tensor for key, tensor in tensors.items() if ".1.mixer.experts.4." not in key}
    with pytest.raises(CheckpointError) as error:
        read(write(tmp_path / "adapter", left), hybrid_dir)
    for projection in ("up_proj", "down_proj"):
        assert f"layers.1.mixer.experts.4.{projection}: adapter_config.json names it, adapter_model.safetensors has no lora_A" in str(
            error.value
        )
    assert str(error.value).count("names it") == 2


def test_an_expert_that_the_config_leaves_out_is_not_adapted(saved, hybrid_dir, tmp_path):
    tensors = {key: tensor for key, tensor in per_expert(load_file(saved / WEIGHTS)).items() if ".experts.4." not in key}
    got = read(write(tmp_path / "adapter", tensors, exclude_modules=["experts.4.up_proj", "experts.4.down_proj"]), hybrid_dir)
    expected = read(saved, hybrid_dir)
    name = "backbone.layers.1.mixer.experts.up_proj"
    assert not got.delta(name, 4).any() and torch.equal(got.delta(name, 5), expected.delta(name, 5)) and got.delta(name, 5).any()


def test_experts_of_several_ranks_are_named(saved, hybrid_dir, tmp_path):
    directory = write(tmp_path / "adapter", per_expert(load_file(saved / WEIGHTS)), rank_pattern={"experts.2.up_proj": 2})
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mixer\.experts\.up_proj: its experts have ranks and alphas of \[\(2, 6.0\), \(3, 6.0\)\]"
    ):
        read(directory, hybrid_dir)


def test_both_forms_in_one_file_are_refused(saved, hybrid_dir, tmp_path):
    fused = load_file(saved / WEIGHTS)
    with pytest.raises(
        CheckpointError, match=r"experts in two forms at once, base_model\S+experts\.\S*lora_[AB]\.weight and base_model\S+experts\.\d"
    ):
        read(write(tmp_path / "adapter", fused | per_expert(fused)), hybrid_dir)


@pytest.mark.parametrize(
    "key, words",
    [
        ("layers.1.mixer.experts.w1.lora_A.weight", "experts in a form that is not read"),
        ("layers.1.mixer.experts.up_proj.lora_A.weight", "experts in a form that is not read"),
        ("layers.1.mixer.experts.lora_gate_and_up_A", "experts in a form that is not read"),
        ("layers.1.mixer.experts.0.gate_proj.lora_A.weight", "no module that adapter_config.json names has this tensor"),
        ("layers.1.mixer.experts.6.up_proj.lora_A.weight", "no module that adapter_config.json names has this tensor"),
        ("layers.1.mixer.experts.00.up_proj.lora_A.weight", "no module that adapter_config.json names has this tensor"),
        ("layers.1.mixer.gate.lora_A.weight", "no module that adapter_config.json names has this tensor"),
        ("model.layers.2.mixer.q_proj.lora_A.weight", "no module that adapter_config.json names has this tensor"),
        ("../../layers.2.mixer.q_proj.lora_A.weight", "no module that adapter_config.json names has this tensor"),
    ],
)
def test_a_key_that_finds_no_home_is_named(saved, hybrid_dir, tmp_path, key, words):
    tensors = per_expert(load_file(saved / WEIGHTS)) | {"base_model.model.model." + key: torch.ones(RANK, 32)}
    with pytest.raises(CheckpointError, match=re.escape(key) + ": " + words):
        read(write(tmp_path / "adapter", tensors, target_modules="all-linear"), hybrid_dir)


def cut(content):
    return content[:-100]


def longer_header(content):
    return (2**40).to_bytes(8, "little") + content[8:]


def another_length(content):
    length = int.from_bytes(content[:8], "little")
    return (length - 8).to_bytes(8, "little") + content[8:]


def beyond_the_end(content):
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    last = max((entry for name, entry in header.items() if name != "__metadata__"), key=lambda entry: entry["data_offsets"][1])
    last["data_offsets"][1] += 4096
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@pytest.mark.parametrize("damage", [cut, longer_header, another_length, beyond_the_end])
def test_a_file_that_is_not_what_its_header_says_is_refused(saved, hybrid_dir, tmp_path, damage):
    directory = write(tmp_path / "adapter", per_expert(load_file(saved / WEIGHTS)))
    (directory / WEIGHTS).write_bytes(damage((directory / WEIGHTS).read_bytes()))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: cannot be read"):
        read(directory, hybrid_dir)


def test_a_value_of_one_expert_that_is_not_finite_is_named(saved, hybrid_dir, tmp_path):
    tensors = per_expert(load_file(saved / WEIGHTS))
    key = next(key for key in tensors if ".experts.3.up_proj.lora_B" in key)
    tensors[key][-1, -1] = torch.nan
    with pytest.raises(CheckpointError, match=f"1 of {len(tensors)} tensors hold values that are not finite, first {re.escape(key)}"):
        read(write(tmp_path / "adapter", tensors), hybrid_dir)


@pytest.mark.parametrize("tensor", [torch.tensor(1.0), torch.zeros(0), torch.zeros(3, 0)])
def test_tensors_without_dims_or_values_are_named_as_any_other(saved, hybrid_dir, tmp_path, tensor):
    tensors = per_expert(load_file(saved / WEIGHTS)) | {"base_model.model.backbone.extra.lora_A.weight": tensor}
    with pytest.raises(CheckpointError, match=r"extra\.lora_A\.weight: no module that adapter_config\.json names has this tensor"):
        read(write(tmp_path / "adapter", tensors), hybrid_dir)
