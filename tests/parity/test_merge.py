"""The merged directory in transformers gives what the adapter gives in ours; what was not adapted keeps its bytes."""

from __future__ import annotations

import json

import pytest
import torch
from random_models import make, relative, with_our_dt_limits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nemotune.errors import CheckpointError, ConflictError, UnsupportedError
from nemotune.export import merge as merging
from nemotune.export import tuned as tuned_module
from nemotune.export.merge import merge
from nemotune.export.tuned import open_tuned
from nemotune.lora import LoRAEmbedding, apply_lora, lora_modules, pairs, save_adapter
from nemotune.lora.pairs import Adapter
from nemotune.models import load_model
from nemotune.recipe import Lora
from nemotune.weights import WritePlan

TOKENS = torch.randint(0, 96, (29,), generator=torch.Generator().manual_seed(1))
BORDERS = torch.tensor([0, 29], dtype=torch.int32)
PATTERNS = Lora(rank=4, alpha=8, rank_pattern={"experts": 2, "q_proj": 9}, alpha_pattern={"mamba": 20, "experts.up_proj": 3})
DORA = Lora(rank=4, alpha=8, dora=True, targets=("attention", "mamba", "mlp", "shared_experts"))
ALL = Lora(rank=4, alpha=8, targets=("attention", "mamba", "mlp", "shared_experts", "experts", "embeddings"))


def with_adapter(path, variant, lora, *, dtype="float32"):
    """A base saved in shards by transformers, our model with a random adapter on it, and the adapter saved."""
    make(variant).to(getattr(torch, dtype)).save_pretrained(path / "base", max_shard_size="20KB")
    model = load_model(path / "base", dtype="float32")
    apply_lora(model, lora)
    with torch.no_grad():
        for _, layer in lora_modules(model):
            begins_at_zero = layer.lora_embedding_A if isinstance(layer, LoRAEmbedding) else layer.lora_B
            begins_at_zero.normal_(0, 0.2, generator=torch.Generator().manual_seed(3))
            if lora.dora:
                layer.lora_magnitude_vector.mul_(torch.rand(layer.out_features, generator=torch.Generator().manual_seed(4)) + 0.5)
    save_adapter(model, path / "adapter", lora, base=str(path / "base"))
    return model.eval()


@pytest.mark.parametrize(
    "variant, lora",
    [
        ("hybrid", ALL),
        ("hybrid", PATTERNS),
        ("hybrid", DORA),
        ("llama_biased", Lora(rank=4, dora=True)),
        ("latent", Lora(rank=4, alpha=8)),
        ("llama", Lora(rank=4)),
        ("llama_tied", Lora(rank=4)),
        ("hybrid", Lora(rank=4, alpha=8, targets=("embeddings", "lm_head", "experts"), rank_pattern={"embeddings": 7})),
        ("llama", Lora(rank=4, alpha=2, targets=("embeddings",))),
    ],
)
def test_merged_logits_equal_adapter_logits(variant, lora, tmp_path):
    ours = with_adapter(tmp_path, variant, lora)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    theirs = with_our_dt_limits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval())
    assert relative(theirs(TOKENS[None], use_cache=False).logits[0], ours.logits(ours(TOKENS, BORDERS))) < 1e-4


@pytest.mark.parametrize("lora", [ALL, DORA])
def test_a_tensor_that_comes_some_rows_at_a_time_is_the_same(lora, tmp_path, monkeypatch):
    with_adapter(tmp_path, "hybrid", lora, dtype="bfloat16")
    tuned = open_tuned(tmp_path / "base", tmp_path / "adapter")
    whole = {name: tuned.read(name) for name in tuned.infos}
    monkeypatch.setattr(tuned_module, "PIECE_NUMEL", 100)
    assert max(len(tuned.pieces(name)) for name in tuned.updates) > 20
    # sums of rank terms may end in another bit where the matrices have other shapes; bf16 keeps 8 of 24
    assert all(relative(tuned.read(name), whole[name]) < 2**-10 for name in tuned.updates)
    assert all(torch.equal(tuned.read(name), whole[name]) for name in tuned.infos if name not in tuned.updates)


def test_whatever_decides_the_values_is_in_the_identity(tmp_path):
    """What is staged is gone on from where it is the same."""
    with_adapter(tmp_path, "llama", Lora(rank=4))
    seen = [open_tuned(tmp_path / "base", tmp_path / "adapter").identity, open_tuned(tmp_path / "base").identity]
    for file in ("base/config.json", "base/chat_template.jinja", "adapter/adapter_model.safetensors", "adapter/generation_config.json"):
        path = tmp_path / file
        path.write_bytes(path.read_bytes() if path.exists() else b"{}")
        seen.append(open_tuned(tmp_path / "base", tmp_path / "adapter").identity)
    assert len({json.dumps(each) for each in seen}) == len(seen) == 6


def test_untouched_tensors_and_shards_keep_their_bytes(tmp_path):
    with_adapter(tmp_path, "hybrid", Lora(rank=4, alpha=8, targets=("attention", "experts")), dtype="bfloat16")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    tuned = open_tuned(tmp_path / "base", tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "base").glob("*.safetensors")}
    assert files == {path.name for path in (tmp_path / "merged").glob("*.safetensors")} and len(files) > 1
    changed = 0
    for file in files:
        before, after = load_file(tmp_path / "base" / file), load_file(tmp_path / "merged" / file)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype
            same = torch.equal(tensor, after[name])
            assert same == (name not in tuned.updates), name
            changed += not same
    assert changed == len(tuned.updates) == 4 + 2 * 2 * 6


def test_a_merge_does_not_overwrite_unless_asked(tmp_path):
    with_adapter(tmp_path, "llama", Lora(rank=4))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("keep")
    with pytest.raises(ConflictError, match="--overwrite"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert (tmp_path / "merged" / "mine.txt").read_text() == "keep"
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", overwrite=True)
    assert not (tmp_path / "merged" / "mine.txt").exists()


def test_a_wrong_shaped_adapter_is_named_and_leaves_nothing(tmp_path):
    with_adapter(tmp_path, "llama", Lora(rank=4))
    make("llama_plain_rope").save_pretrained(tmp_path / "other")
    shard = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(shard)
    key = next(key for key in tensors if key.endswith("layers.1.self_attn.q_proj.lora_A.weight"))
    tensors[key] = tensors[key][:, :-1].contiguous()
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj.*expected"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_an_update_is_computed_in_fp32_and_rounded_once(tmp_path):
    with_adapter(tmp_path, "hybrid", ALL, dtype="bfloat16")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    tuned = open_tuned(tmp_path / "base", tmp_path / "adapter")
    rounded_twice = 0
    for name, (module, expert) in tuned.updates.items():
        weight, (A, B) = tuned.base.read(name), (t if expert is None else t[expert] for t in tuned.adapter.pairs[module])
        delta, got = 2.0 * B @ A, load_file(tmp_path / "merged" / tuned.infos[name].file)[name]
        assert torch.equal(got, (weight.float() + delta).bfloat16()), name
        rounded_twice += int((got != weight + delta.bfloat16()).sum())
    assert rounded_twice > 100, "weights that bf16 arithmetic would change"


def test_a_base_that_lacks_a_tensor_is_refused_before_a_byte_is_written(tmp_path):
    with_adapter(tmp_path, "hybrid", Lora(rank=4, targets=("attention",)))
    index = tmp_path / "base" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shard = tmp_path / "base" / listed["weight_map"].pop("backbone.norm_f.weight")
    index.write_text(json.dumps(listed))
    tensors = load_file(shard)
    del tensors["backbone.norm_f.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 tensors do not fit config.json:\n  backbone\.norm_f\.weight: missing, expected shape \(32,\)"
    ):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", done=lambda _: pytest.fail("wrote"))
    assert not (tmp_path / "merged").exists()


def test_an_adapter_on_a_tied_head_is_refused(tmp_path):
    with_adapter(tmp_path, "llama_tied", Lora(rank=4, targets=("lm_head", "q_proj")))
    with pytest.raises(UnsupportedError, match="lm_head is tied to the embeddings"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_a_merge_says_what_it_read_back(tmp_path):
    with_adapter(tmp_path, "hybrid", Lora(rank=4, targets=("attention", "mlp")), dtype="bfloat16")
    verified = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    everything = tuple(open_tuned(tmp_path / "base", tmp_path / "adapter").infos.values())
    assert verified.updated == 4 + 2 and verified.untouched == len(everything) - 6


def test_what_is_read_back_is_a_bounded_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SAMPLED_TENSORS", 3)
    monkeypatch.setattr(merging, "SAMPLED_ROWS", 5)
    with_adapter(tmp_path, "hybrid", Lora(rank=4))
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged") == merging.Verified(updated=3, untouched=3)


@pytest.mark.parametrize(
    "wrong", [lambda delta: -delta, lambda delta: delta * 1.02, lambda delta: delta * 0, lambda delta: delta.roll(1, 0)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_wrong_update_is_never_called_done(tmp_path, monkeypatch, wrong, dtype):
    with_adapter(tmp_path, "hybrid", ALL, dtype=dtype)
    right = Adapter.delta
    monkeypatch.setattr(Adapter, "delta", lambda self, *which: wrong(right(self, *which)))
    with pytest.raises(CheckpointError, match=r"are not base \+ adapter.*mixer"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_values_that_are_cut_off_and_not_rounded_are_never_called_done(tmp_path, monkeypatch):
    with_adapter(tmp_path, "hybrid", ALL, dtype="bfloat16")
    right = Adapter.updated
    monkeypatch.setattr(Adapter, "updated", lambda *of, **start: (right(*of, **start).view(torch.int32) & -(2**16)).view(torch.float32))
    with pytest.raises(CheckpointError, match=r"are not base \+ adapter.*mixer"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("wrong", [lambda gain: gain * 1.02, lambda gain: gain * 0 + 1, lambda gain: gain.roll(1, 0)])
def test_a_wrong_length_of_rows_is_never_called_done(tmp_path, monkeypatch, wrong, dtype):
    with_adapter(tmp_path, "hybrid", DORA, dtype=dtype)
    right = pairs.gains
    monkeypatch.setattr(pairs, "gains", lambda *which: wrong(right(*which)))
    with pytest.raises(CheckpointError, match=r"are not base \+ adapter.*mixer"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_dora_is_merged_in_bf16_rounded_once(tmp_path):
    """Up to where fp32 and fp64 round to neighbours: of a dozen bits more than bf16 keeps, under one weight in a thousand."""
    with_adapter(tmp_path, "hybrid", DORA, dtype="bfloat16")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    tuned = open_tuned(tmp_path / "base", tmp_path / "adapter")
    for name, (module, _) in tuned.updates.items():
        A, B = (t.double() for t in tuned.adapter.pairs[module])
        V = tuned.base.read(name).double() + 2.0 * B @ A
        exact = (tuned.adapter.magnitudes[module].double() / V.norm(dim=1))[:, None] * V
        got = load_file(tmp_path / "merged" / tuned.infos[name].file)[name]
        assert (got != exact.bfloat16()).float().mean() < 1e-3, name


@pytest.mark.parametrize("touched", ["backbone.norm_f.weight", "backbone.layers.2.mixer.q_proj.weight"])
def test_a_byte_that_changed_on_its_way_is_never_called_done(tmp_path, monkeypatch, touched):
    with_adapter(tmp_path, "hybrid", Lora(rank=4, targets=("attention",)))

    def write_index(directory, plan):
        right(directory, plan)
        file = tuned.infos[touched].file
        tensors = load_file(directory / file)
        tensors[touched].view(torch.uint8).flatten()[-1] ^= 4
        save_file(tensors, directory / file, metadata={"format": "pt"})

    right, tuned = merging.write_index, open_tuned(tmp_path / "base", tmp_path / "adapter")
    monkeypatch.setattr(merging, "write_index", write_index)
    with pytest.raises(CheckpointError, match=touched.replace(".", r"\.")):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_another_set_of_tensors_is_never_called_done(tmp_path, monkeypatch):
    with_adapter(tmp_path, "llama", Lora(rank=4))

    right, write_index = merging.weight_files, merging.write_index

    def without_the_last(plan):
        return WritePlan(plan.tensors[:-1])

    monkeypatch.setattr(merging, "weight_files", lambda plan, pieces: right(without_the_last(plan), pieces))
    monkeypatch.setattr(merging, "write_index", lambda directory, plan: write_index(directory, without_the_last(plan)))
    with pytest.raises(CheckpointError, match="names, shapes and dtypes"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_base_with_values_that_are_not_finite_is_refused_by_name(tmp_path, dtype, value):
    with_adapter(tmp_path, "llama", Lora(rank=4, targets=("q_proj",)), dtype=dtype)
    base = open_tuned(tmp_path / "base").infos["model.layers.1.mlp.up_proj.weight"]
    tensors = load_file(tmp_path / "base" / base.file)
    tensors[base.name][-1, 3] = value
    save_file(tensors, tmp_path / "base" / base.file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_tensors_without_dims_or_values_are_copied(tmp_path):
    """Such as counters that a training left beside the layers that no forward uses."""
    with_adapter(tmp_path, "hybrid", Lora(rank=4, targets=("attention",)))
    shard = sorted((tmp_path / "base").glob("*.safetensors"))[0]
    odd = {"mtp.count": torch.tensor(3), "mtp.none": torch.empty(0, 4), "mtp.narrow": torch.empty(4, 0)}
    save_file(load_file(shard) | odd, shard, metadata={"format": "pt"})
    index = tmp_path / "base" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"] |= dict.fromkeys(odd, shard.name)
    index.write_text(json.dumps(listed))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    written = load_file(tmp_path / "merged" / shard.name)
    assert all(torch.equal(written[name], tensor) for name, tensor in odd.items())
