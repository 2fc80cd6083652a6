"""An adapter is read whole or refused: what its config names and what its file holds are the same modules."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotune.errors import CheckpointError
from nemotune.lora import apply_lora, load_adapter, lora_modules, save_adapter
from nemotune.lora.adapter import read_adapter
from nemotune.lora.layers import scale
from nemotune.models import build_model, load_model, read_config
from nemotune.recipe import Lora

PLAIN, DORA = Lora(rank=2, alpha=6, targets=("attention", "mlp", "experts")), Lora(rank=2, targets=("attention", "mlp"), dora=True)
ATTENTION = [f"model.layers.2.mixer.{p}_proj" for p in "qkvo"]


@pytest.fixture
def adapter(hybrid_dir, tmp_path):
    """An adapter of rank 2 on attention, MLP and experts."""
    save(hybrid_dir, tmp_path / "adapter")
    return tmp_path / "adapter"


def save(hybrid_dir, directory, *, dtype="float32", lora=PLAIN):
    model = load_model(hybrid_dir, dtype=dtype)
    apply_lora(model, lora)
    with torch.no_grad():
        for _, layer in lora_modules(model):
            layer.lora_B.normal_(0, 0.2, generator=torch.Generator().manual_seed(3))
    save_adapter(model, directory, lora, base="hf")
    return model


def read(adapter, hybrid_dir):
    return read_adapter(adapter, build_model(read_config(hybrid_dir)))


def set_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit(adapter, change):
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


def keep(adapter, *parts):
    edit(adapter, lambda tensors: {name: tensor for name, tensor in tensors.items() if any(part in name for part in parts)})


def test_what_is_read_is_what_was_saved(adapter, hybrid_dir):
    got = read(adapter, hybrid_dir)
    assert got.lora == Lora(rank=2, alpha=6, targets=tuple(got.pairs)) and scale(got.lora) == 3.0
    assert len(got.pairs) == 4 + 2 + 2 * 2


@pytest.mark.parametrize(
    "targets",
    [ATTENTION, [name.replace("model.", "backbone.") for name in ATTENTION], ["q_proj", "k_proj", "v_proj", "o_proj"], r".*\.[qkvo]_proj"],
)
def test_modules_are_named_as_peft_names_them(adapter, hybrid_dir, targets):
    keep(adapter, ".mixer.q_proj.", ".mixer.k_proj.", ".mixer.v_proj.", ".mixer.o_proj.")
    set_config(adapter, target_modules=targets, target_parameters=None)
    assert [name.rpartition(".")[2] for name in read(adapter, hybrid_dir).pairs] == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize(
    "changes, missing",
    [
        ({}, ["backbone.layers.2.mixer.q_proj", "backbone.layers.2.mixer.v_proj", "backbone.layers.3.mixer.up_proj"]),
        ({"target_modules": ["q_proj", "k_proj"], "target_parameters": None}, ["backbone.layers.2.mixer.q_proj"]),
        ({"target_modules": r"model\.layers\.2\..*(q|k)_proj", "target_parameters": None}, ["backbone.layers.2.mixer.q_proj"]),
        ({"target_modules": "all-linear", "target_parameters": None}, ["backbone.layers.0.mixer.in_proj"]),
        ({"target_modules": ["k_proj"]}, ["backbone.layers.1.mixer.experts.up_proj", "backbone.layers.5.mixer.experts.down_proj"]),
        ({"target_modules": ["k_proj"], "target_parameters": ["experts.down_proj"]}, ["backbone.layers.5.mixer.experts.down_proj"]),
    ],
)
def test_modules_without_tensors_are_listed(adapter, hybrid_dir, changes, missing):
    keep(adapter, ".mixer.k_proj.")
    set_config(adapter, **changes)
    with pytest.raises(CheckpointError) as error:
        read(adapter, hybrid_dir)
    for name in missing:
        assert f"{name}: adapter_config.json names it, adapter_model.safetensors has no lora_A of it" in str(error.value)
    assert "k_proj" not in str(error.value)


def test_excluded_modules_need_no_tensors(adapter, hybrid_dir):
    keep(adapter, ".mixer.k_proj.")
    set_config(adapter, target_modules=["q_proj", "k_proj"], exclude_modules=r"model\..*\.q_proj", target_parameters=None)
    assert list(read(adapter, hybrid_dir).pairs) == ["backbone.layers.2.mixer.k_proj"]


def test_tensors_that_the_config_does_not_name_are_listed(adapter, hybrid_dir):
    set_config(adapter, target_modules=[name for name in ATTENTION if "q_proj" not in name])
    with pytest.raises(CheckpointError) as error:
        read(adapter, hybrid_dir)
    assert str(error.value).count("no module that adapter_config.json names has this tensor") == 2 * (1 + 2)
    assert "base_model.model.model.layers.2.mixer.q_proj.lora_B.weight" in str(error.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_named(adapter, hybrid_dir, value):
    def spoil(tensors):
        next(tensor for name, tensor in tensors.items() if name.endswith("q_proj.lora_B.weight"))[0, 0] = value
        return tensors

    edit(adapter, spoil)
    with pytest.raises(CheckpointError, match=r"safetensors: 1 of \d+ tensors hold values that are not finite, first .*q_proj\.lora_B"):
        read(adapter, hybrid_dir)


def test_half_a_pair_is_named(adapter, hybrid_dir):
    edit(adapter, lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith("q_proj.lora_B.weight")})
    with pytest.raises(CheckpointError, match=r"layers\.2\.mixer\.q_proj: .* has no lora_B of it"):
        read(adapter, hybrid_dir)


def test_rows_that_the_experts_do_not_divide_are_named(adapter, hybrid_dir):
    key = "base_model.model.model.layers.1.mixer.experts.lora_A.weight"
    edit(adapter, lambda tensors: {**tensors, key: tensors[key][:-1]})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mixer\.experts\.down_proj: got A and B of \(\(11, 24\).*expected \(\(12, 24\)"):
        read(adapter, hybrid_dir)


def test_experts_of_another_rank_are_named(adapter, hybrid_dir):
    set_config(adapter, r=3, target_modules=[])
    keep(adapter, ".experts.")
    with pytest.raises(CheckpointError, match=r"experts\.up_proj: got A and B of \(\(12, 32\).*expected \(\(18, 32\)"):
        read(adapter, hybrid_dir)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"r": ...}, "r: Field required"),
        ({"lora_alpha": ...}, "lora_alpha: Field required"),
        ({"r": "many"}, "r: Input should be a valid integer"),
        ({"r": 0}, "r: Input should be greater than 0"),
        ({"peft_type": "LOHA"}, "peft_type: Input should be 'LORA'"),
        ({"target_modules": "(q_proj"}, r"target_modules: .*no regular expression"),
        ({"rank_pattern": {"(q_proj": 3}}, r"rank_pattern: .*no regular expression"),
        ({"lora_alpha": math.inf}, "lora_alpha: Input should be a finite number"),
        ({"alpha_pattern": {"q_proj": math.inf}}, "alpha_pattern: Input should be a finite number"),
        ({"alpha_pattern": {"q_proj": "much"}}, r"alpha_pattern: Input should be a valid number"),
        ({"rank_pattern": {"q_proj": 3}}, r"layers\.2\.mixer\.q_proj: got A and B of \(\(2, 32\).*expected \(\(3, 32\)"),
        ({"target_parameters": ["q_proj.weight"]}, r"target_parameters: 'q_proj\.weight' are no experts"),
        ({"target_modules": ["w1"], "target_parameters": None}, "no module that adapter_config.json names"),
    ],
)
def test_a_config_that_does_not_fit_is_told_by_its_key(adapter, hybrid_dir, changes, words):
    set_config(adapter, **changes)
    with pytest.raises(CheckpointError, match=words):
        read(adapter, hybrid_dir)


def test_an_adapter_of_nothing_is_refused(adapter, hybrid_dir):
    set_config(adapter, target_modules=[], target_parameters=None)
    keep(adapter)
    with pytest.raises(CheckpointError, match="adapter_config.json names no module of it"):
        read(adapter, hybrid_dir)


@pytest.mark.parametrize(
    "key, value",
    [
        ("fan_in_fan_out", True), ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]), ("layers_to_transform", [2]), ("layers_pattern", "layers"), ("lora_bias", True), ("use_qalora", True),
        ("layer_replication", [[0, 2]]), ("trainable_token_indices", [5]), ("alora_invocation_tokens", [1]), ("init_lora_weights", "pissa"),
        ("a_setting_of_tomorrow", "on"),
    ],
)  # fmt: skip
def test_what_would_be_computed_wrong_is_refused_by_its_key(adapter, hybrid_dir, key, value):
    set_config(adapter, **{key: value})
    with pytest.raises(CheckpointError, match=f"got {key}: .*merge this adapter with PEFT"):
        read(adapter, hybrid_dir)


def test_every_refused_key_is_told_at_once(adapter, hybrid_dir):
    set_config(adapter, lora_bias=True, bias="all")
    with pytest.raises(CheckpointError, match='bias: "all".*lora_bias: true|lora_bias: true.*bias: "all"'):
        read(adapter, hybrid_dir)


@pytest.mark.parametrize("damage", ["{", "[]", "\xff", "[" * 10**5])
def test_a_config_that_cannot_be_read_is_named(adapter, hybrid_dir, damage):
    (adapter / "adapter_config.json").write_bytes(damage.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: "):
        read(adapter, hybrid_dir)


def test_an_adapter_of_a_bf16_base_is_fp32_on_disk_and_comes_back_to_the_bit(hybrid_dir, tmp_path):
    model = save(hybrid_dir, tmp_path / "adapter", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {torch.float32}
    again = load_model(hybrid_dir, dtype="bfloat16")
    load_adapter(again, tmp_path / "adapter")
    before, after = dict(lora_modules(model)), dict(lora_modules(again))
    assert before.keys() == after.keys()
    for name, layer in before.items():
        assert torch.equal(layer.lora_A, after[name].lora_A) and torch.equal(layer.lora_B, after[name].lora_B), name


def test_dora_comes_back_to_the_bit_and_lacking_or_wrong_magnitudes_are_named(hybrid_dir, tmp_path):
    model = save(hybrid_dir, tmp_path / "adapter", lora=DORA)
    with torch.no_grad():
        for _, layer in lora_modules(model):
            layer.lora_magnitude_vector.mul_(1.5)
    save_adapter(model, tmp_path / "adapter", DORA, base="hf", overwrite=True)
    again = load_model(hybrid_dir, dtype="float32")
    load_adapter(again, tmp_path / "adapter")
    for (_, one), (_, other) in zip(lora_modules(model), lora_modules(again), strict=True):
        assert all(torch.equal(*both) for both in zip(one.parameters(recurse=False), other.parameters(recurse=False), strict=True))
    key = "base_model.model.model.layers.3.mixer.up_proj.lora_magnitude_vector"
    edit(tmp_path / "adapter", lambda tensors: {**tensors, key: tensors[key][1:]})
    with pytest.raises(CheckpointError, match=r"up_proj: got A, B and magnitude of .*\(47,\)\), expected .*\(48,\)\)"):
        read(tmp_path / "adapter", hybrid_dir)
    edit(tmp_path / "adapter", lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key})
    with pytest.raises(CheckpointError, match=r"layers\.3\.mixer\.up_proj: .* has no lora_magnitude_vector of it"):
        read(tmp_path / "adapter", hybrid_dir)
    set_config(tmp_path / "adapter", use_dora=False)
    with pytest.raises(CheckpointError, match=r"lora_magnitude_vector: no module that adapter_config.json names has this tensor"):
        read(tmp_path / "adapter", hybrid_dir)
