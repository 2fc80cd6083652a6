"""Hugging Face to Megatron and back: every tensor has a home or is named, and comes back bit for bit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from random_models import make
from safetensors.torch import load_file, save_file

from nemotune.errors import CheckpointError, MissingFileError, UnsupportedError
from nemotune.export.megatron import dcp_files, fitting
from nemotune.export.megatron.checkpoint import open_megatron
from nemotune.export.megatron.fitting import Compared
from nemotune.export.megatron.to_hf import open_export
from nemotune.export.megatron.to_megatron import plan_import
from nemotune.export.stream import write
from nemotune.export.tuned import open_tuned
from nemotune.train.storage import Block, write_blocks

VARIANTS = ("hybrid", "one_group", "wide_heads", "four_ways", "llama", "llama_tied")  # the others differ in no tensor's layout


def hf(path: Path, variant: str, *, dtype: torch.dtype = torch.bfloat16, **more: object) -> Path:
    make(variant, **more).to(dtype).save_pretrained(path, max_shard_size="20KB")
    return path


def add(directory: Path, tensors: dict[str, torch.Tensor], **config: object) -> None:
    """More tensors, in a shard of their own, and more keys of config.json."""
    save_file(tensors, directory / "more.safetensors")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "more.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({**json.loads((directory / "config.json").read_text()), **config}))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def imported(source: Path, target: Path) -> Path:
    report = write(plan_import(open_tuned(source), verify_all=True), target)
    assert report.whole and report.tensors == report.of > 0
    return target


def exported(checkpoint: Path, target: Path, base: Path | None = None) -> Path:
    write(open_export(open_megatron(checkpoint), base).plan(verify_all=True), target)
    return target


def mtp_tensors(hidden: int = 32, experts: int = 6) -> dict[str, torch.Tensor]:
    """Two repetitions of the pattern `*E`: flat, as in Nemotron 3 Super."""
    found = {}
    for outer in (0, 2):
        first, last = f"mtp.layers.{outer}.", f"mtp.layers.{outer + 1}."
        shapes = {
            f"{first}eh_proj.weight": (hidden, 2 * hidden),
            **{f"{first}{name}.weight": (hidden,) for name in ("enorm", "hnorm", "norm")},
        }
        shapes |= {f"{first}mixer.{p}_proj.weight": (rows, hidden) for p, rows in (("q", 32), ("k", 16), ("v", 16))}
        shapes |= {f"{first}mixer.o_proj.weight": (hidden, 32), f"{last}norm.weight": (hidden,), f"{last}final_layernorm.weight": (hidden,)}
        shapes |= {f"{last}mixer.gate.weight": (experts, hidden), f"{last}mixer.gate.e_score_correction_bias": (experts,)}
        shapes |= {f"{last}mixer.experts.{e}.up_proj.weight": (24, hidden) for e in range(experts)}
        shapes |= {f"{last}mixer.experts.{e}.down_proj.weight": (hidden, 24) for e in range(experts)}
        shapes |= {f"{last}mixer.shared_experts.up_proj.weight": (40, hidden), f"{last}mixer.shared_experts.down_proj.weight": (hidden, 40)}
        found |= {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_every_tensor_is_the_same_bit_for_bit(tmp_path, variant):
    source = hf(tmp_path / "hf", variant)
    checkpoint = imported(source, tmp_path / "megatron")
    assert same(weights(exported(checkpoint, tmp_path / "back", source)), weights(source))
    assert [file.name for file in sorted(source.glob("*.safetensors"))] == [
        f.name for f in sorted((tmp_path / "back").glob("*.safetensors"))
    ]
    alone = exported(checkpoint, tmp_path / "alone")  # config.json lies in tokenizer/
    values = {name: tensor.to(weights(source)[name].dtype) for name, tensor in weights(alone).items()}
    assert same(values, {n: t for n, t in weights(source).items() if n in values}) and (alone / "config.json").is_file()


@pytest.mark.parametrize("variant", ["four_ways", "llama"])
def test_large_models_go_in_several_files_and_some_rows_at_a_time_and_dcp_itself_loads_them(tmp_path, monkeypatch, variant):
    source = hf(tmp_path / "hf", variant)
    whole = open_megatron(imported(source, tmp_path / "whole")).stored
    monkeypatch.setattr(fitting, "SLAB_NUMEL", 300)
    monkeypatch.setattr(dcp_files, "MAX_FILE_BYTES", 20_000)
    cut = open_megatron(imported(source, tmp_path / "cut"))
    assert len(list(cut.directory.glob("__0_*.distcp"))) > 3
    assert max(math.prod(chunk.sizes) for tensor in cut.stored.tensors.values() for chunk in tensor.chunks) <= 300
    assert same(weights(exported(tmp_path / "cut", tmp_path / "back", source)), weights(source))
    loaded = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in cut.stored.tensors.items()}
    dcp.load(loaded, checkpoint_id=cut.directory, planner=dcp.DefaultLoadPlanner(flatten_state_dict=False), no_dist=True)
    assert same(loaded, {name: whole.read(name) for name in whole.tensors})


def test_queries_lie_with_their_group_and_gate_before_up_in_layers_that_are_stacked(tmp_path):
    source = weights(hf(tmp_path / "hf", "llama"))
    stored = open_megatron(imported(tmp_path / "hf", tmp_path / "megatron")).stored
    q, k, v = (source[f"model.layers.1.self_attn.{p}_proj.weight"].view(-1, 16, 32) for p in "qkv")
    fused = torch.cat([q[:2], k[:1], v[:1], q[2:], k[1:], v[1:]]).flatten(0, 1)
    assert torch.equal(stored.read("decoder.layers.self_attention.linear_qkv.weight")[1], fused)
    gate_up = torch.cat([source[f"model.layers.2.mlp.{p}_proj.weight"] for p in ("gate", "up")])
    assert torch.equal(stored.read("decoder.layers.mlp.linear_fc1.weight")[2], gate_up)


def test_mambas_projection_is_cut_into_z_x_b_c_dt_and_its_convolution_into_x_b_c(tmp_path):
    source = weights(hf(tmp_path / "hf", "wide_heads"))
    stored = open_megatron(imported(tmp_path / "hf", tmp_path / "megatron")).stored
    inner, state = 6 * 24, 3 * 16
    for name, sizes in (
        ("in_proj.weight", {"z": inner, "x": inner, "B": state, "C": state, "dt": 6}),
        ("conv1d.weight", {"x": inner, "B": state, "C": state}),
        ("conv1d.bias", {"x": inner, "B": state, "C": state}),
    ):
        parts = source[f"backbone.layers.0.mixer.{name}"].split(list(sizes.values()))
        for part, values in zip(sizes, parts, strict=True):
            assert torch.equal(stored.read(f"decoder.layers.0.mixer.{name}.{part}"), values), (name, part)


def test_every_module_of_transformer_engine_has_its_extra_state(tmp_path):
    """Megatron's strict loading wants them: a shard a layer of a stack, and an expert."""
    hf(tmp_path / "hf", "four_ways")  # ME*-E
    found = open_megatron(imported(tmp_path / "hf", tmp_path / "megatron")).stored.objects
    moe = (
        "pre_mlp_layernorm",
        "mlp.shared_experts.linear_fc1",
        "mlp.shared_experts.linear_fc2",
        "mlp.fc1_latent_proj",
        "mlp.fc2_latent_proj",
    )
    modules = [f"0.mixer.{name}" for name in ("in_proj", "out_proj")] + [
        f"2.self_attention.{name}" for name in ("linear_qkv", "linear_proj")
    ]
    modules += [f"3.mlp.{name}" for name in ("linear_fc1", "linear_fc2")] + [f"{layer}.{name}" for layer in (1, 4) for name in moe]
    expected = {f"decoder.layers.{module}._extra_state/shard_0_1" for module in modules}
    expected |= {f"{module}._extra_state/shard_0_1" for module in ("decoder.final_norm", "output_layer")}
    experts = [f"decoder.layers.{layer}.mlp.experts.experts.linear_fc{i}._extra_state" for layer in (1, 4) for i in (1, 2)]
    assert found == expected | {f"{module}/shard_{expert}_6" for module in experts for expert in range(6)}
    hf(tmp_path / "llama", "llama")
    found = open_megatron(imported(tmp_path / "llama", tmp_path / "dense")).stored.objects
    modules = [
        f"decoder.layers.{name}" for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    ]
    expected = {f"{module}._extra_state/shard_{layer}_3" for module in modules for layer in range(3)}
    assert found == expected | {f"{module}._extra_state/shard_0_1" for module in ("decoder.final_layernorm", "output_layer")}


def test_run_config_says_what_config_json_does(tmp_path):
    """Of what no tensor's shape tells, and of which another value would train another model."""
    hf(tmp_path / "hf", "grouped_router", norm_eps=3e-5, layer_norm_epsilon=3e-5, routed_scaling_factor=1.75)
    told = open_megatron(imported(tmp_path / "hf", tmp_path / "megatron")).model
    expected = {
        "layernorm_epsilon": 3e-5, "moe_router_topk_scaling_factor": 1.75, "moe_router_num_groups": 3, "moe_router_group_topk": 2,
        "moe_router_topk": 2, "num_moe_experts": 6, "mamba_num_groups": 2, "mamba_state_dim": 16, "hybrid_override_pattern": "EMEE",
        "share_embeddings_and_output_weights": False, "num_query_groups": 2, "kv_channels": 8, "seq_length": 256,
    }  # fmt: skip
    assert {key: told[key] for key in expected} == expected
    hf(tmp_path / "llama", "llama_tied")
    told = open_megatron(imported(tmp_path / "llama", tmp_path / "dense")).model
    expected = {
        "rotary_base": 5000,
        "rope_scaling": True,
        "rope_scaling_factor": 8.0,
        "share_embeddings_and_output_weights": True,
        "kv_channels": 16,
    }
    assert {key: told[key] for key in expected} == expected


def test_a_release_is_an_iteration_without_a_number(tmp_path):
    source = hf(tmp_path / "hf", "llama")
    checkpoint = imported(source, tmp_path / "megatron")
    (checkpoint / "iter_0000000").rename(checkpoint / "release")
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert same(weights(exported(checkpoint, tmp_path / "back", source)), weights(source))


def test_mtp_is_nested_there_and_flat_here(tmp_path):
    source = hf(tmp_path / "hf", "hybrid")
    add(source, mtp_tensors(), mtp_hybrid_override_pattern="*E", num_nextn_predict_layers=2)
    checkpoint = open_megatron(imported(source, tmp_path / "megatron"))
    names = {name for name in checkpoint.stored.tensors if name.startswith("mtp.layers.1.")}
    assert {"mtp.layers.1.eh_proj.weight", "mtp.layers.1.final_layernorm.weight"} <= names
    assert "mtp.layers.1.mtp_model_layer.layers.1.mlp.experts.experts.linear_fc1.weight" in names
    assert "mtp.layers.1.mtp_model_layer.layers.0.self_attention.linear_qkv._extra_state/shard_0_1" in checkpoint.stored.objects
    assert checkpoint.model["mtp_num_layers"] == 2 and checkpoint.model["mtp_hybrid_override_pattern"] == "*E"
    assert same(weights(exported(tmp_path / "megatron", tmp_path / "back", source)), weights(source))


def test_mtp_that_a_training_left_out_is_the_bases(tmp_path):
    source = hf(tmp_path / "hf", "hybrid")
    imported(source, tmp_path / "megatron")
    tensors = {**mtp_tensors(), "mtp.number": torch.tensor(1.5), "mtp.nothing": torch.zeros(0, 4)}
    add(source, tensors, mtp_hybrid_override_pattern="*E")
    export = open_export(open_megatron(tmp_path / "megatron"), source)
    assert export.notes == [f"{len(tensors)} tensors that the checkpoint lacks are the base's, first mtp.nothing"]
    assert same(weights(exported(tmp_path / "megatron", tmp_path / "back", source)), weights(source))


def test_a_head_that_is_stored_although_tied_comes_back(tmp_path):
    source = hf(tmp_path / "hf", "llama_tied")
    add(source, {"lm_head.weight": weights(source)["model.embed_tokens.weight"]})
    checkpoint = imported(source, tmp_path / "megatron")
    assert "output_layer.weight" not in open_megatron(checkpoint).stored.tensors
    assert same(weights(exported(checkpoint, tmp_path / "back", source)), weights(source))


@pytest.mark.parametrize(
    ("variant", "kind", "error"),
    [
        ("llama_biased", CheckpointError, r"model\.layers\.0\.mlp\.down_proj\.bias: has no place in Megatron's model"),
        ("no_conv_bias", UnsupportedError, "use_conv_bias: false: Megatron's Mamba layers always have that bias"),
    ],
)
def test_what_megatron_cannot_hold_is_refused_by_name(tmp_path, variant, kind, error):
    with pytest.raises(kind, match=error):
        plan_import(open_tuned(hf(tmp_path / "hf", variant)))


def test_mtp_without_a_pattern_is_refused_by_name(tmp_path):
    add(hf(tmp_path / "hf", "hybrid"), mtp_tensors(), mtp_layers_block_type=None)
    with pytest.raises(CheckpointError, match=r"mtp\.layers\.0\.eh_proj\.weight: has no place in Megatron's model"):
        plan_import(open_tuned(tmp_path / "hf"))


@pytest.fixture
def stored(tmp_path):
    """A checkpoint of a hybrid with everything, its source, and its tensors."""
    source = hf(tmp_path / "hf", "four_ways")
    imported(source, tmp_path / "megatron")
    opened = open_megatron(tmp_path / "megatron")
    return source, opened.directory, {name: opened.stored.read(name) for name in opened.stored.tensors}


def rewrite(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The checkpoint's tensors anew, as DCP itself writes them."""
    for file in (*directory.glob("*.distcp"), directory / ".metadata"):
        file.unlink()
    dcp.save(tensors, checkpoint_id=directory, planner=dcp.DefaultSavePlanner(flatten_state_dict=False), no_dist=True)


def test_shards_of_many_ranks_read_alike(stored, tmp_path):
    """Tensor parallel: halves of rows of the first projections, of columns of the second; expert parallel: two experts each."""
    source, _, tensors = stored
    blocks = []
    for name, values in tensors.items():
        dim = values.ndim - 1 if name.endswith(("linear_fc2.weight", "linear_proj.weight", "out_proj.weight")) else max(0, values.ndim - 2)
        at = 0
        for half in values.chunk(2, dim):
            place = tuple(at if i == dim else 0 for i in range(values.ndim))
            at += half.shape[dim]
            for rank, part in enumerate(half.split(2) if values.ndim == 3 and "experts" in name else [half]):
                here = (2 * rank, *place[1:]) if values.ndim == 3 and "experts" in name else place
                blocks.append(Block(name, tuple(values.shape), here, part.clone(memory_format=torch.contiguous_format)))
    write_blocks(blocks, tmp_path / "sharded", beside=lambda aside: None)
    assert len(blocks) > 2 * len(tensors)
    assert same(weights(exported(tmp_path / "sharded", tmp_path / "back", source)), weights(source))


def test_rows_of_a_padded_vocabulary_are_left_and_what_is_no_weight_is_not_looked_at(stored, tmp_path):
    source, directory, tensors = stored
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[name] = torch.cat([tensors[name], torch.full((32, 32), 7.0).bfloat16()])
    tensors["decoder.final_layernorm.weight"] = tensors.pop("decoder.final_norm.weight")  # as some versions of hybrid models call it
    tensors["decoder.layers.0.mixer.in_proj._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    tensors["optimizer.state.exp_avg.decoder.final_norm.weight"] = torch.zeros(3)
    tensors["chained_0.optimizer.state.exp_avg.decoder.final_norm.weight"] = torch.zeros(3)
    rewrite(directory, tensors)
    assert same(weights(exported(directory, tmp_path / "back", source)), weights(source))


def test_tensors_that_do_not_fit_are_named_all_at_once(stored):
    source, directory, tensors = stored
    tensors["decoder.layers.0.mixer.in_proj.weight.q"] = tensors.pop("decoder.layers.0.mixer.in_proj.weight.z")
    tensors["decoder.final_norm.weight"] = tensors["decoder.final_norm.weight"][:-1]
    tensors.pop("output_layer.weight")
    rewrite(directory, tensors)
    with pytest.raises(CheckpointError) as error:
        open_export(open_megatron(directory), source)
    for line in (
        "decoder.layers.0.mixer.in_proj.weight.q: has no place in nemotron_h", "backbone.layers.0.mixer.in_proj.weight: the tensors of Megatron that it is made of have gaps",
        "backbone.norm_f.weight: got shape (31,), expected (32,)", "lm_head.weight: the checkpoint has nothing of it, expected shape (96, 32)",
    ):  # fmt: skip
        assert line in str(error.value)


def test_fp32_weights_are_rounded_to_the_bases_dtype_but_the_routers_bias_only_where_that_loses_nothing(stored, tmp_path):
    source, directory, tensors = stored
    wide = {name: tensor.float() * (1 + 2**-12) for name, tensor in tensors.items()}
    wide["decoder.layers.1.mlp.router.expert_bias"] = tensors["decoder.layers.1.mlp.router.expert_bias"]
    rewrite(directory, wide)
    export = open_export(open_megatron(directory), source)
    assert export.notes == ["the checkpoint holds F32, written is the base's BF16"]
    back = weights(exported(directory, tmp_path / "back", source))
    kinds = {name.split(".")[2]: tensor.dtype for name, tensor in back.items() if name.endswith("e_score_correction_bias")}
    assert kinds == {"1": torch.bfloat16, "4": torch.float32}
    assert torch.equal(back["backbone.norm_f.weight"], wide["decoder.final_norm.weight"].bfloat16())


def test_values_that_are_not_finite_are_refused_in_both_directions(stored, tmp_path):
    source, directory, tensors = stored
    tensors["decoder.final_norm.weight"][3] = float("nan")
    rewrite(directory, tensors)
    with pytest.raises(CheckpointError, match=r"decoder\.final_norm\.weight: holds values that are not finite"):
        exported(directory, tmp_path / "back", source)
    shutil.copytree(source, tmp_path / "bad")
    file = next(file for file in (tmp_path / "bad").glob("*.safetensors") if "backbone.norm_f.weight" in load_file(file))
    save_file({**load_file(file), "backbone.norm_f.weight": torch.full((32,), float("inf")).bfloat16()}, file)
    with pytest.raises(CheckpointError, match=r"backbone\.norm_f\.weight: holds values that are not finite"):
        imported(tmp_path / "bad", tmp_path / "target")
    assert not (tmp_path / "target").exists() and not (tmp_path / "back").exists()


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_tensor_that_was_written_wrong_is_found(stored, tmp_path, monkeypatch, direction):
    source, directory, _ = stored
    plan = (
        plan_import(open_tuned(source), verify_all=True)
        if direction == "import"
        else open_export(open_megatron(directory), source).plan(verify_all=True)
    )
    assert isinstance(plan.verify(tmp_path / "megatron" if direction == "import" else source), Compared)
    if direction == "import":
        tensors = stored[2]
        tensors["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"][2, 3, 4] += 1
        rewrite(directory, tensors)
        with pytest.raises(
            CheckpointError,
            match=r"1 of \d+ tensors read back are not those of the source, first backbone\.layers\.1\.mixer\.experts\.2\.up_proj",
        ):
            plan.verify(tmp_path / "megatron")
    else:
        file = next(file for file in source.glob("*.safetensors") if "backbone.layers.2.mixer.k_proj.weight" in load_file(file))
        tensors = load_file(file)
        tensors["backbone.layers.2.mixer.k_proj.weight"][5, 4] += 1
        save_file(tensors, file)
        with pytest.raises(
            CheckpointError,
            match=r"1 of \d+ tensors read back are not those of the checkpoint, first decoder\.layers\.2\.self_attention\.linear_qkv",
        ):
            plan.verify(source)


def test_a_checkpoint_that_says_too_little_or_lies_is_refused_clearly(stored, tmp_path):
    source, directory, _ = stored
    (directory / "tokenizer" / "config.json").unlink()
    config = yaml.safe_load((directory / "run_config.yaml").read_text())
    assert open_export(open_megatron(directory)).beside == source  # hf_model_id is a directory here
    config["model"]["hf_model_id"] = "gone/model"
    (directory / "run_config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(
        MissingFileError, match=r"no config\.json in tokenizer/, and hf_model_id .* \(gone/model\) is no directory here; .* --base"
    ):
        open_export(open_megatron(directory))
    (directory / "run_config.yaml").write_text("model: !!python/object/apply:os.mkdir [/tmp/never]")
    with pytest.raises(CheckpointError, match=r"run_config\.yaml: cannot be read \(could not determine a constructor"):
        open_megatron(directory)
    (directory / "run_config.yaml").write_text("[" * 3000)
    with pytest.raises(CheckpointError, match=r"run_config\.yaml: cannot be read \(maximum recursion"):
        open_megatron(directory)
    (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(CheckpointError, match=r"got '\.\./\.\./etc', expected the number of an iteration"):
        open_megatron(tmp_path / "megatron")
    with pytest.raises(MissingFileError, match=r"no latest_checkpointed_iteration\.txt and no \.metadata"):
        open_megatron(source)
