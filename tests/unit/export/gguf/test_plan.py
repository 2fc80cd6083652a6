"""What a GGUF file says: types, keys and values are those of convert_hf_to_gguf.py and llama-quantize (llama.cpp 0.5.0-dev, ggml 0.25.3).

types_of_llama_quantize.json holds, for models of `random_models.py`, the types of the tensors of its files in their order
(`dense` was quantised from our f16 file: convert_hf_to_gguf.py's does not load).
"""

from __future__ import annotations

import json
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, LlamaFileType
from safetensors.torch import load_file, save_file
from toy_gguf import TINY, edit_json, saved

from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.export.gguf import llama_cpp
from nemotune.export.gguf.names import gguf_tensors, left_out
from nemotune.export.gguf.plan import fallback, plan_gguf
from nemotune.export.gguf.types import KINDS, num_bytes_of, types_of
from nemotune.export.stream import write
from nemotune.export.tuned import Tuned, open_tuned
from nemotune.models import build_model, parse_config

REAL = os.environ.get("NEMOTUNE_TEST_DATA")
PINNED = json.loads(Path(__file__).with_name("types_of_llama_quantize.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)


def exported(directory: Path, kind: str = "f32") -> GGUFReader:
    path = directory / f"{kind}.gguf"
    write(plan_gguf(open_tuned(directory), kind), path)
    return GGUFReader(path)


def keys(reader: GGUFReader) -> dict:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def values(reader: GGUFReader, name: str) -> np.ndarray:
    return next(tensor.data for tensor in reader.tensors if tensor.name == name)


@pytest.mark.parametrize("name", PINNED)
def test_types_are_those_of_llama_quantize(name, tmp_path):
    tuned = open_tuned(saved(tmp_path, PINNED[name]["variant"], **PINNED[name]["config"]))
    tensors = gguf_tensors(tuned)
    for kind, pinned in PINNED[name]["types"].items():
        types, _ = types_of(tensors, tuned.model.config, kind)
        assert " ".join(type_.name for type_ in types.values()) == pinned, kind


def test_values_of_a_llama_of_70_b_that_eight_heads_share_take_more_bits(tmp_path):
    """llama-quant.cpp: q4_k_m's attn_v is Q5_K where the model has 80 layers and grouped queries."""
    tuned = open_tuned(saved(tmp_path, "llama", hidden_size=256, intermediate_size=32, num_hidden_layers=80))
    types, _ = types_of(gguf_tensors(tuned), tuned.model.config, "q4_k_m")
    assert {types[f"blk.{i}.attn_v.weight"].name for i in (0, 12, 79)} == {"Q6_K"}
    assert {types[f"blk.{i}.attn_v.weight"].name for i in (10, 11, 13, 14)} == {"Q5_K"} and types["blk.10.attn_k.weight"].name == "Q4_K"
    types, _ = types_of(gguf_tensors(tuned), tuned.model.config, "q5_k_m")
    assert types["blk.10.attn_v.weight"].name == "Q5_K"


def test_positions_that_are_stretched_are_told(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    found = keys(exported(saved(tmp_path, "llama", rope_parameters=rope)))
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 4.0)


def test_how_much_takes_a_wider_type_is_told(tmp_path):
    tuned = open_tuned(saved(tmp_path, "llama", hidden_size=256, intermediate_size=96, num_hidden_layers=1))
    down = 256 * 96
    assert fallback(tuned, "q4_k_m").numel == down + 256 * 64  # down's rows of 96 and attn_output's of 64
    assert fallback(tuned, "q8_0").numel == 0
    assert 0 < fallback(tuned, "q4_k_m").share < 0.1


@pytest.mark.skipif(not REAL, reason="NEMOTUNE_TEST_DATA")
def test_most_of_nemotron_3_nano_takes_a_wider_type():
    """Rows of 2688, 1856 and 3712. docs/gguf.md has these figures."""
    path = Path(REAL or "") / "data" / "nemotron" / "configs" / "NVIDIA-Nemotron-3-Nano-30B-A3B.config.VERBATIM.json"
    config = parse_config(json.loads(path.read_text(encoding="utf-8")))
    tensors = gguf_tensors(Tuned(path.parent, None, build_model(config), None, None, {}))
    for kind, bits, share in (("q8_0", 8.5, 0), ("q5_k_m", 6.6, 0.978), ("q4_k_m", 6.2, 0.978)):
        types, fallback = types_of(tensors, config, kind)
        num_bytes = sum(num_bytes_of(tensor, types[tensor.name]) for tensor in tensors)
        assert (round(8 * num_bytes / fallback.of, 1), round(fallback.share, 3)) == (bits, share)


def test_keys_of_a_llama(tmp_path):
    found = keys(exported(saved(tmp_path / "Little-Nemotron", "llama")))
    tokenizer = {name: found.pop(name) for name in list(found) if name.startswith("tokenizer.")}
    assert found == {
        "general.architecture": "llama", "general.type": "model", "general.name": "Little Nemotron",
        "general.size_label": "133K", "general.file_type": LlamaFileType.ALL_F32, "general.quantization_version": 2,
        "llama.block_count": 3, "llama.context_length": 512, "llama.embedding_length": 32, "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.key_length": 16, "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6), "llama.rope.freq_base": 5000.0, "llama.rope.dimension_count": 16,
        "llama.vocab_size": 1504,
    }  # fmt: skip
    assert {name.removeprefix("tokenizer.") for name in tokenizer} == {
        "chat_template", "ggml.model", "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.merges", "ggml.bos_token_id", "ggml.eos_token_id",
        "ggml.eot_token_id", "ggml.unknown_token_id", "ggml.padding_token_id", "ggml.add_bos_token", "ggml.add_eos_token",
    }  # fmt: skip


def test_a_card_that_yaml_makes_numbers_of_is_told_and_one_that_cannot_be_is_named(tmp_path):
    directory = saved(tmp_path, "llama")
    (directory / "README.md").write_text("---\nversion: 1.5\nmodel_name: 7\n---\n")
    found = keys(exported(directory))
    assert (found["general.version"], found["general.name"]) == ("1.5", "7")
    broken = (
        b"---\n[\n---\n",
        b"---\na: !!python/object/apply:os.system [x]\n---\n",
        b"\xff",
        b"---\nauthor: [[1]]\n---\n",
        b"---\n" + b"[" * 3000,
    )
    for card in broken:
        (directory / "README.md").write_bytes(card)
        with pytest.raises(CheckpointError, match=r"README\.md or generation_config\.json: a GGUF file has no place"):
            plan_gguf(open_tuned(directory), "f32")


def test_keys_of_a_hybrid_with_latent_experts(tmp_path):
    found = keys(exported(saved(tmp_path / "model", "latent")))
    head = "nemotron_h_moe."
    assert {name.removeprefix(head): value for name, value in found.items() if name.startswith(head)} == {
        "block_count": 4, "context_length": 2**20, "embedding_length": 32, "vocab_size": 1504, "feed_forward_length": [0, 24, 0, 24],
        "attention.head_count": 4, "attention.head_count_kv": [0, 0, 2, 0], "attention.key_length": 8, "attention.value_length": 8,
        "attention.layer_norm_epsilon": pytest.approx(1e-5), "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 8, "rope.scaling.finetuned": False,
        "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2, "ssm.inner_size": 64, "ssm.time_step_rank": 4,
        "expert_count": 6, "expert_used_count": 2, "expert_group_count": 1, "expert_group_used_count": 1, "expert_feed_forward_length": 24,
        "expert_shared_feed_forward_length": 40, "expert_shared_count": 1, "expert_weights_norm": True, "expert_weights_scale": 2.5,
        "moe_latent_size": 16,
    }  # fmt: skip


def test_a_dense_hybrid_saved_by_transformers_has_no_experts(tmp_path):
    """Its config.json always has num_experts_per_tok, from which convert_hf_to_gguf.py makes a nemotron_h_moe that does not load."""
    directory = saved(tmp_path / "model", "hybrid", hybrid_override_pattern="M-*")
    assert "num_experts_per_tok" in json.loads((directory / "config.json").read_text())
    found = keys(exported(directory))
    assert found["general.architecture"] == "nemotron_h" and not [name for name in found if "expert" in name]
    assert found["nemotron_h.feed_forward_length"] == [0, 48, 0]


def test_multi_token_prediction_is_left_out(tmp_path):
    """With `num_nextn_predict_layers` convert_hf_to_gguf.py announces a block that is not there."""
    directory = saved(tmp_path / "model", "hybrid", hybrid_override_pattern="ME*", num_nextn_predict_layers=1)
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"mtp.layers.0.enorm.weight": torch.ones(32)}, directory / "model.safetensors", metadata={"format": "pt"})
    assert left_out(open_tuned(directory)) == ["mtp.layers.0.enorm.weight"]
    reader = exported(directory)
    assert keys(reader)["nemotron_h_moe.block_count"] == 3 and not any("nextn" in name for name in keys(reader))
    assert not any(tensor.name.startswith("blk.3") for tensor in reader.tensors)


def test_a_vocabulary_that_is_no_multiple_of_eight_keeps_its_size(tmp_path):
    reader = exported(saved(tmp_path / "model", "one_group", vocab_size=1507))
    found = keys(reader)
    assert len(found["tokenizer.ggml.tokens"]) == len(values(reader, "token_embd.weight")) == found["nemotron_h.vocab_size"] == 1507
    assert found["tokenizer.ggml.tokens"][1504:] == ["[PAD1504]", "[PAD1505]", "[PAD1506]"]


def test_values_are_changed_as_llama_cpp_wants_them(tmp_path):
    directory = saved(tmp_path / "model", "wide_heads")
    reader, weights = exported(directory), load_file(directory / "model.safetensors")
    mixer = {name.split("mixer.")[1]: tensor.float().numpy() for name, tensor in weights.items() if "layers.0.mixer." in name}
    assert np.allclose(values(reader, "blk.0.ssm_a"), -np.exp(mixer["A_log"])[:, None], rtol=1e-6)
    assert np.array_equal(values(reader, "blk.0.ssm_d"), mixer["D"][:, None])
    assert np.array_equal(values(reader, "blk.0.ssm_norm.weight"), mixer["norm.weight"].reshape(3, -1))
    assert np.array_equal(values(reader, "blk.0.ssm_conv1d.weight"), mixer["conv1d.weight"][:, 0])
    q = next(tensor.float().numpy() for name, tensor in weights.items() if name.endswith("q_proj.weight"))
    halves = q.reshape(4, 2, 4, -1)  # heads of 8
    assert np.array_equal(values(reader, "blk.1.attn_q.weight").reshape(4, 4, 2, -1), halves.swapaxes(1, 2))


def test_experts_are_stacked_in_their_order(tmp_path):
    directory = saved(tmp_path / "model", "hybrid", hybrid_override_pattern="ME*")
    weights = load_file(directory / "model.safetensors")
    stacked = values(exported(directory), "blk.1.ffn_up_exps.weight")
    one_each = [next(t for name, t in weights.items() if f"layers.1.mixer.experts.{e}.up_proj" in name) for e in range(6)]
    assert np.array_equal(stacked, torch.stack(one_each).float().numpy())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"time_step_limit": [0.0, 0.1]}, r"time_step_limit: got \[0.0, 0.1\]"),
        ({"use_bias": True}, "no place for 4 tensors, first backbone.layers.0.mixer.in_proj.bias"),
        ({"hybrid_override_pattern": "M-M"}, "layers_block_type: no attention layer"),
        ({"hybrid_override_pattern": "ME*-", "moe_latent_size": 16}, "layer 3 is a dense MLP beside latent experts"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(changes, message, tmp_path):
    config = {"hybrid_override_pattern": "MM*"} | changes
    limit = {"time_step_limit": config.pop("time_step_limit")} if "time_step_limit" in config else {}
    directory = saved(tmp_path / "model", "hybrid", **config)
    edit_json(directory / "config.json", **limit)
    with pytest.raises(UnsupportedError, match=message):
        plan_gguf(open_tuned(directory), "f16")


def test_a_dense_layer_beside_experts_is_its_shared_expert_and_the_two_that_are_always_chosen(tmp_path):
    """By their margin: no order of equal scores matters."""
    directory = saved(tmp_path / "model", "hybrid", hybrid_override_pattern="ME*-", intermediate_size=100)
    reader, weights = exported(directory), load_file(directory / "model.safetensors")
    part = {name: torch.from_numpy(np.array(values(reader, f"blk.3.{name}"))) for name in
            ("ffn_gate_inp.weight", "exp_probs_b.bias", "ffn_up_exps.weight", "ffn_down_exps.weight", "ffn_up_shexp.weight", "ffn_down_shexp.weight")}  # fmt: skip
    up, down = (weights[f"backbone.layers.3.mixer.{name}_proj.weight"].float() for name in ("up", "down"))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    scores = (x @ part["ffn_gate_inp.weight"].T).sigmoid()
    chosen = (scores + part["exp_probs_b.bias"]).topk(3).values.diff()  # of the second to the third
    assert (scores == 0.5).all() and (chosen[:, 1] <= -0.5).all()
    shared = (x @ part["ffn_up_shexp.weight"].T).relu().square() @ part["ffn_down_shexp.weight"].T
    routed = sum((x @ part["ffn_up_exps.weight"][e].T).relu().square() @ part["ffn_down_exps.weight"][e].T for e in range(2))
    assert torch.allclose(shared + 2.5 / 2 * routed, (x @ up.T).relu().square() @ down.T, rtol=1e-4, atol=1e-5)


def test_fused_experts_are_refused_by_name(tmp_path):
    """No checkpoint of these models has them so; convert_hf_to_gguf.py fails on them as well."""
    directory = saved(tmp_path / "model", "hybrid", hybrid_override_pattern="ME*")
    weights = load_file(directory / "model.safetensors")
    up = [f"backbone.layers.1.mixer.experts.{expert}.up_proj.weight" for expert in range(6)]
    weights["backbone.layers.1.mixer.experts.up_proj"] = torch.stack([weights.pop(name) for name in up])
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts.0.up_proj.weight: missing(.|\n)*experts.up_proj: has no place"):
        open_tuned(directory)


def test_an_unknown_type_is_refused_with_the_nearest():
    with pytest.raises(UnsupportedError, match=r"--type: got 'q4_km', expected one of f32, .*Did you mean 'q4_k_m'\?"):
        plan_gguf(open_tuned(TINY), "q4_km")


def test_a_value_that_f16_cannot_hold_is_refused_by_its_tensor(tmp_path):
    directory = saved(tmp_path / "model", "llama")
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up.weight: 1 of .* not finite"):
        exported(directory, "f16")
    assert exported(directory, "bf16")


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_knows_the_files_size(kind, tmp_path):
    plan = plan_gguf(open_tuned(TINY), kind)
    write(plan, tmp_path / "tiny.gguf")
    assert (tmp_path / "tiny.gguf").stat().st_size == plan.num_bytes


def test_a_file_of_another_type_or_name_is_another_export():
    """What is staged under one target is gone on from only by the same."""
    tuned = open_tuned(TINY)
    seen = [plan_gguf(tuned, kind, name=name).identity for kind in ("q4_k_m", "q5_k_m") for name in (None, "a")]
    assert all(one != other for one, other in combinations(seen, 2))


def test_damage_on_the_disk_is_found(tmp_path):
    plan = plan_gguf(open_tuned(TINY), "q4_k_m")
    path = tmp_path / "tiny.gguf"
    write(plan, path)
    for name in ("blk.0.ssm_in.weight", "token_embd.weight"):
        whole = path.read_bytes()
        tensor = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == name)
        with path.open("r+b") as file:
            file.seek(int(tensor.data_offset + tensor.n_bytes - 400))
            file.write(bytes(200))
        with pytest.raises(CheckpointError, match=f"first {name}"):
            plan.verify(path)
        path.write_bytes(whole)
    path.write_bytes(path.read_bytes().replace(b"ssm_conv1d", b"ssm_conv2d", 1))
    with pytest.raises(CheckpointError, match="its header"):
        plan.verify(path)
    path.write_bytes(whole[:-32])
    with pytest.raises(CheckpointError, match="its length is not as planned"):
        plan.verify(path)
