"""Rows near zero are found in the tables of both families, and a repaired model has the mean of the others there and every other byte as it was."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import random_models
import torch
from safetensors.torch import load_file, save_file

from nemotune.errors import CheckpointError, ConflictError
from nemotune.export import untrained_rows
from nemotune.export.untrained_rows import open_tables, repair, scan
from nemotune.models import load_model
from nemotune.weights import Checkpoint

ZERO, TINY = [7, 50], 61  # rows that are zero, and one that is a ten-thousandth of what it was
BOUNDARY = torch.tensor([0, 3, 5], dtype=torch.int32)
TOKENS = torch.tensor([7, 3, 9, 50, 11])


def made(path, variant, *, head=(), dtype=torch.float32, **save):
    """A random model with rows that no training reached, as transformers saves it."""
    model = random_models.make(variant)
    with torch.no_grad():
        model.get_input_embeddings().weight[ZERO] = 0
        model.get_input_embeddings().weight[TINY] *= 1e-4
        model.lm_head.weight[list(head)] = 0
    model.to(dtype).save_pretrained(path, **save)
    return path


def rows_found(path):
    return {kind: table.near_zero for kind, table in scan(open_tables(path)).items()}


@pytest.mark.parametrize("rows_at_once", [13, 4096])
@pytest.mark.parametrize(
    "variant, found",
    [
        ("hybrid", {"embeddings": [*ZERO, TINY], "head": [0, 95]}),
        ("llama", {"embeddings": [*ZERO, TINY], "head": [0, 95]}),
        ("llama_tied", {"embeddings": [0, *ZERO, TINY, 95]}),
    ],
)
def test_rows_near_zero_are_found_wherever_they_lie(variant, found, rows_at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(untrained_rows, "ROWS_AT_ONCE", rows_at_once)
    made(tmp_path, variant, head=[0, 95])
    assert rows_found(tmp_path) == found


def test_a_row_is_near_zero_under_a_thousandth_of_the_median(tmp_path):
    model = random_models.make("llama")
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        rms = weight.square().mean(1).sqrt()
        weight[4] *= 0.9e-3 * rms.median() / rms[4]
        weight[5] *= 1.1e-3 * rms.median() / rms[5]
    model.save_pretrained(tmp_path)
    assert rows_found(tmp_path) == {"embeddings": [4], "head": []}


def test_tables_are_read_some_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(untrained_rows, "ROWS_AT_ONCE", 10)
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: pytest.fail(f"{name} was read whole"))
    seen, slices = [], Checkpoint.slices

    def watched(self, name, num_rows):
        for rows in slices(self, name, num_rows):
            seen.append((name, len(rows)))
            yield rows

    monkeypatch.setattr(Checkpoint, "slices", watched)
    told = []
    scan(open_tables(made(tmp_path, "hybrid")), done=told.append)
    assert seen == [(name, n) for name in ("backbone.embeddings.weight", "lm_head.weight") for n in [10] * 9 + [6]]
    assert sum(told) == untrained_rows.num_rows(open_tables(tmp_path)) == 192


def digests(path):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("variant, table", [("hybrid", "model.embeddings.weight"), ("llama", "model.embed_tokens.weight")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repaired_rows_are_the_mean_of_the_others_and_all_else_keeps_its_bytes(variant, table, dtype, tmp_path):
    base = made(tmp_path / "base", variant, head=[3], dtype=dtype, max_shard_size="20KB")
    (base / "README.txt").write_text("anything")
    (base / "vocab.bin").write_bytes(b"\x00\x01")
    before = digests(base)
    repaired = repair(base, tmp_path / "out")
    assert {kind: found.near_zero for kind, found in repaired.items()} == {"embeddings": [*ZERO, TINY], "head": [3]}
    assert digests(base) == before, "the source is only read"
    shards = {
        Checkpoint(base).tensors[name].file
        for name in (table if table in Checkpoint(base) else "backbone.embeddings.weight", "lm_head.weight")
    }
    after = digests(tmp_path / "out")
    assert before.keys() == after.keys() and {name for name in before if before[name] != after[name]} == shards
    assert len(before) > len(shards) + 3, "several shards"
    old, new = Checkpoint(base), Checkpoint(tmp_path / "out")
    assert old.tensors == new.tensors
    for name in old.tensors:
        was, now = old.read(name), new.read(name)
        ids = {"lm_head.weight": [3]}.get(name, [*ZERO, TINY] if "embed" in name else [])
        others = [i for i in range(len(was)) if i not in ids]
        assert torch.equal(was[others], now[others]) and now.dtype == was.dtype, name
        if ids:
            mean = was[others].double().mean(0).to(dtype)
            torch.testing.assert_close(now[ids], mean.expand(len(ids), -1), rtol=torch.finfo(dtype).eps, atol=0)
    assert rows_found(tmp_path / "out") == {"embeddings": [], "head": []}
    load_model(tmp_path / "out")


def test_a_stored_copy_of_a_tied_head_is_repaired_alike(tmp_path):
    base = made(tmp_path / "base", "llama_tied")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert rows_found(base) == {"embeddings": [*ZERO, TINY]}
    repair(base, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"]) and written["lm_head.weight"][ZERO].any(1).all()
    load_model(tmp_path / "out")


def test_nothing_near_zero_writes_nothing(tmp_path):
    random_models.make("llama").save_pretrained(tmp_path / "base")
    assert repair(tmp_path / "base", tmp_path / "out") == {}
    assert not (tmp_path / "out").exists()


def test_what_exists_is_not_replaced_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    base = made(tmp_path / "base", "llama")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConflictError, match="already exists"):
        repair(base, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())

    def interrupted(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        repair(base, tmp_path / "other")
    assert not list(tmp_path.glob("*other*"))


def test_a_mean_that_is_near_zero_repairs_nothing(tmp_path):
    model = random_models.make("llama")
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[:48] = -weight[48:]
        weight[[1, 49]] = 0
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"mean of the rows of model\.embed_tokens\.weight is near zero as well"):
        repair(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


DEEP = {
    "llama": ("llama", dict(num_hidden_layers=24, rms_norm_eps=1e-5)),
    "attention": ("nemotron_h", dict(hybrid_override_pattern="*" * 24, num_hidden_layers=24)),
    "hybrid": ("nemotron_h", dict(hybrid_override_pattern="M-*" * 8, num_hidden_layers=24)),
}


@pytest.mark.parametrize("family", DEEP)
def test_a_zero_row_overflows_the_gradient_of_a_deep_model_and_the_repaired_one_is_finite(family, tmp_path, monkeypatch):
    """At the published epsilon, 1e-5: each norm multiplies a zero row's gradient by up to 316, block after block."""
    monkeypatch.setitem(random_models.VARIANTS, "deep", DEEP[family])
    base = made(tmp_path / "base", "deep")
    repair(base, tmp_path / "out")
    largest = {}
    for which in ("base", "out"):
        model = load_model(tmp_path / which, dtype="float32", trainable=True)
        assert model.config.norm_eps == 1e-5
        loss = model.loss(model(TOKENS, BOUNDARY), TOKENS.roll(-1))
        assert loss.isfinite(), "the forward says nothing of it"
        loss.backward()
        largest[which] = model.embeddings.weight.grad.abs().amax(1)[TOKENS]
    assert not largest["base"].isfinite().all()
    assert largest["out"].isfinite().all() and largest["out"].max() < 1000 * largest["out"].median()
