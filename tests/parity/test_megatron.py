"""Checkpoints that Megatron-Bridge wrote, and ours of the same models: equal tensor for tensor in both directions; megatron-core loads ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from nemotune.export.adapters.opened import open_adapter
from nemotune.export.adapters.peft_files import plan_for_peft, plan_for_vllm
from nemotune.export.megatron.checkpoint import open_megatron
from nemotune.export.megatron.lora import read_lora
from nemotune.export.megatron.lora_files import plan_lora
from nemotune.export.megatron.run_config import run_config
from nemotune.export.megatron.to_hf import open_export
from nemotune.export.megatron.to_megatron import plan_import
from nemotune.export.merge import plan_merge
from nemotune.export.stream import write
from nemotune.export.tuned import open_tuned
from nemotune.models import read_config

REAL = os.environ.get("NEMOTUNE_TEST_DATA")
pytestmark = pytest.mark.skipif(not REAL, reason="NEMOTUNE_TEST_DATA is not set")
FIXTURES = Path(str(REAL)) / "fixtures" / "megatron"
MODELS = ("llama_tiny", "nemotron_h_tiny")


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """A model's name, our checkpoint of it, and Megatron-Bridge's."""
    path = tmp_path_factory.mktemp("megatron") / request.param
    compared = write(plan_import(open_tuned(FIXTURES / "hf" / request.param), verify_all=True), path)
    assert compared.tensors == compared.of == len(load_file(FIXTURES / "hf" / request.param / "model.safetensors"))
    return request.param, open_megatron(path), open_megatron(FIXTURES / "ckpt_bridge_0.3.1" / request.param)


def test_our_import_is_megatron_bridges_tensor_for_tensor_with_every_extra_state(model):
    _, ours, theirs = model
    assert ours.stored.tensors.keys() == theirs.stored.tensors.keys()
    for name in ours.stored.tensors:
        one, other = ours.stored.read(name), theirs.stored.read(name)
        assert one.dtype == other.dtype and torch.equal(one, other), name
    assert ours.stored.objects >= theirs.stored.objects


def test_our_export_of_megatron_bridges_checkpoint_is_the_model_it_was_made_from(model, tmp_path):
    name, _, theirs = model
    hf = FIXTURES / "hf" / name
    write(open_export(theirs, hf).plan(verify_all=True), tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    assert {file.name for file in hf.iterdir()} == {file.name for file in (tmp_path / "hf").iterdir()}


def test_what_run_config_says_is_what_megatron_bridge_says(model):
    """Every key is one that it writes, with its value: but for Llama's rotary base, where 0.3.1 looked in the wrong place of config.json."""
    _, ours, theirs = model
    own, told = ours.model, theirs.model
    assert {key: value for key, value in own.items() if key not in told} == {}
    different = {key for key in own if own[key] != told[key]} - {"hf_model_id"}
    assert different <= {"rotary_base"} and own.get("rotary_base", 500_000) == 500_000
    minimal = yaml.safe_load((FIXTURES / "run_config.minimal.yaml").read_text())
    if "hybrid_override_pattern" in own:
        assert minimal["model"].keys() <= own.keys()


def test_run_config_has_keys_of_both_generations_with_their_values():
    """But for the class of hybrid models, whose older name newer versions read too, and what concerns a GPU."""
    told = open_megatron(FIXTURES / "ckpt_bridge_0.7_lora").run_config
    own = run_config(read_config(FIXTURES / "hf" / "nemotron_h_tiny"), tokenizer="hf/nemotron_h_tiny", mtp_depth=0)
    different = {key for section in ("model", "checkpoint", "tokenizer") for key in own[section] if told[section][key] != own[section][key]}
    assert different == {"_target_", "hybrid_override_pattern", "gradient_accumulation_fusion"}
    assert told["model"]["hybrid_layer_pattern"] == own["model"]["hybrid_override_pattern"]


def test_files_beside_the_tensors_are_megatron_bridges(model):
    _, ours, theirs = model
    for name in ("common.pt", "train_state.pt", "../latest_train_state.pt"):
        one, other = (torch.load(checkpoint.directory / name, weights_only=True) for checkpoint in (ours, theirs))
        assert str(one) == str(other)
    names = [{str(path.relative_to(c.directory.parent)) for path in c.directory.parent.rglob("*")} for c in (ours, theirs)]
    assert {name for name in names[1] if not name.endswith(".distcp")} <= names[0]


def test_megatron_core_loads_ours_in_shards_and_finds_every_extra_state(model):
    """With the strictness that raises on anything missing; as the second of two tensor-parallel ranks, the last of two expert-parallel ones."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    _, ours, theirs = model
    assert dist_checkpointing.load_common_state_dict(str(ours.directory))["checkpoint_version"] == 3.0
    wanted, expected = {}, {}
    for name, tensor in theirs.stored.tensors.items():
        halved = next((dim for dim, size in enumerate(tensor.shape) if size % 2 == 0), None)
        part = tensor.shape if halved is None else tuple(n // 2 if d == halved else n for d, n in enumerate(tensor.shape))
        offsets = () if halved is None else ((halved, 1, 2),)
        wanted[name] = ShardedTensor.from_rank_offsets(name, torch.empty(part, dtype=tensor.dtype), *offsets)
        whole = theirs.stored.read(name)
        expected[name] = whole if halved is None else whole.narrow(halved, part[halved], part[halved])
    for name in theirs.stored.objects:
        key, _, shard = name.rpartition("/shard_")
        at, of = map(int, shard.split("_"))
        wanted[name] = ShardedObject(key, None, (of,), (at,))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        loaded = dist_checkpointing.load(wanted, str(ours.directory), validate_access_integrity=False, strict="raise_unexpected")
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert {(loaded[name].dtype, loaded[name].numel()) for name in theirs.stored.objects} == {(torch.uint8, 0)}


def test_a_lora_checkpoint_merges_to_megatron_bridges_own_merge(tmp_path):
    """Summed in fp32 and rounded once, as there. The router's bias keeps the base's dtype."""
    tuned = open_tuned(FIXTURES / "hf" / "nemotron_h_tiny", FIXTURES / "ckpt_bridge_0.7_lora", read=read_lora)
    write(plan_merge(tuned), tmp_path / "merged")
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", FIXTURES / "hf_lora_merged"))
    assert ours.keys() == theirs.keys() and len(tuned.updates) == 30
    for name, tensor in ours.items():
        assert torch.equal(tensor.to(theirs[name].dtype), theirs[name]), name
        assert tensor.dtype == theirs[name].dtype or name.endswith("e_score_correction_bias")


@pytest.mark.parametrize("plan", [plan_for_peft, plan_for_vllm])
def test_a_lora_checkpoint_in_another_form_merges_to_megatron_bridges_own_merge(plan, tmp_path):
    base = FIXTURES / "hf" / "nemotron_h_tiny"
    write(plan(open_adapter(FIXTURES / "ckpt_bridge_0.7_lora", base)), tmp_path / "adapter")
    write(plan_merge(open_tuned(base, tmp_path / "adapter")), tmp_path / "merged")
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", FIXTURES / "hf_lora_merged"))
    for name, tensor in ours.items():
        assert torch.equal(tensor.to(theirs[name].dtype), theirs[name]), name


def test_a_lora_checkpoint_there_and_back_has_megatron_bridges_names_shapes_and_values(tmp_path):
    """Its q, k and v share an A, so nothing is widened; each expert's adapter is written as its own."""
    theirs = open_megatron(FIXTURES / "ckpt_bridge_0.7_lora")
    write(plan_lora(open_adapter(theirs.directory, FIXTURES / "hf" / "nemotron_h_tiny")), tmp_path / "lora")
    ours = open_megatron(tmp_path / "lora")
    assert ours.stored.tensors.keys() == theirs.stored.tensors.keys()
    for name, tensor in ours.stored.tensors.items():
        assert tensor.dtype == theirs.stored.tensors[name].dtype and torch.equal(ours.stored.read(name), theirs.stored.read(name)), name
    told, own = theirs.run_config["peft"], ours.run_config["peft"]
    assert own.keys() <= told.keys()
    assert {key for key in own if own[key] != told[key]} == {"target_modules", "share_expert_adapters"}
    assert set(own["target_modules"]) == set(told["target_modules"]) and own["share_expert_adapters"] is False
