"""An adapter in every form that is written comes back to the bit; what a form cannot hold is refused before anything is written."""

from __future__ import annotations

import json
import math
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import make
from safetensors.torch import load_file, save_file

from nemotune.errors import CheckpointError, ConflictError, UnsupportedError
from nemotune.export.adapters.opened import open_adapter
from nemotune.export.adapters.peft_files import plan_for_peft, plan_for_vllm, vllm_max_rank
from nemotune.export.adapters.same_scale import same_scale
from nemotune.export.megatron.lora_files import plan_lora
from nemotune.export.stream import write
from nemotune.lora import apply_lora, lora_modules, save_adapter
from nemotune.lora.adapter import CONFIG, WEIGHTS
from nemotune.lora.layers import scale
from nemotune.models import load_model
from nemotune.recipe import Lora

ALL = ("attention", "mamba", "mlp", "shared_experts", "experts")
NUMBER = count()


@pytest.fixture(scope="module")
def place(hybrid_dir, tmp_path_factory):
    """Makes an adapter of random values, zeros of both signs and tiny ones among them, and gives its directory."""
    root = tmp_path_factory.mktemp("adapters")

    def made(lora):
        model = load_model(hybrid_dir, dtype="float32")
        apply_lora(model, lora)
        with torch.no_grad():
            for seed, (_, layer) in enumerate(lora_modules(model)):
                for parameter in layer.parameters(recurse=False):
                    parameter.normal_(generator=torch.Generator().manual_seed(seed))
                    parameter.view(-1)[:3] = torch.tensor([0.0, -0.0, 1e-42])
        directory = root / str(next(NUMBER))
        save_adapter(model, directory, lora, base="nvidia/base")
        return directory

    return made


def through(source, base, *plans):
    """The adapter after each plan in turn."""
    for plan in plans:
        target = source.parent / str(next(NUMBER))
        write(plan(open_adapter(source, base)), target)
        source = target
    return source


def file_bytes(directory):
    return {name: tensor.view(torch.int32) for name, tensor in load_file(directory / WEIGHTS).items()}


def assert_same_file(one, other):
    a, b = file_bytes(one), file_bytes(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


BLOCKS = st.lists(st.sampled_from(ALL), min_size=1, max_size=5, unique=True)


@settings(max_examples=8, deadline=None)
@given(
    targets=BLOCKS, rank=st.integers(1, 5), alpha=st.sampled_from([1, 8, 3.5]), rslora=st.booleans(), dropout=st.sampled_from([0.0, 0.1])
)
def test_an_adapter_comes_back_from_vllm_s_form_to_the_bit(place, hybrid_dir, targets, rank, alpha, rslora, dropout):
    ours = place(Lora(rank=rank, alpha=alpha, rslora=rslora, dropout=dropout, targets=tuple(targets)))
    back = through(ours, hybrid_dir, plan_for_vllm, plan_for_peft)
    assert_same_file(ours, back)
    assert json.loads((back / CONFIG).read_text()) == json.loads((ours / CONFIG).read_text())


@settings(max_examples=8, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    alphas=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    rslora=st.booleans(),
)
def test_patterns_come_back_from_peft_s_form_to_the_bit(place, hybrid_dir, ranks, alphas, rslora):
    keys = ("q_proj", "experts.up_proj", "mamba")
    lora = Lora(
        rank=4,
        alpha=8,
        rslora=rslora,
        targets=ALL,
        rank_pattern=dict(zip(keys, ranks, strict=True)),
        alpha_pattern=dict(zip(keys, alphas, strict=True)),
    )
    ours = place(lora)
    back = through(ours, hybrid_dir, plan_for_peft)
    assert_same_file(ours, back)
    assert json.loads((back / CONFIG).read_text()) == json.loads((ours / CONFIG).read_text())


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scales_of_their_own_become_one_of_each_for_vllm(place, hybrid_dir, rslora):
    """B A times the scale stays what it was: to the bit where scales differ by powers of two, else to one rounding of B."""
    lora = Lora(
        rank=4, alpha=8, rslora=rslora, targets=ALL, rank_pattern={"experts": 2, "q_proj": 6}, alpha_pattern={"mamba": 32, "k_proj": 3}
    )
    ours = open_adapter(place(lora), hybrid_dir)
    theirs = open_adapter(through(ours.directory, hybrid_dir, plan_for_vllm), hybrid_dir)
    config = json.loads((theirs.directory / CONFIG).read_text())
    assert config["r"] == 6 and not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    assert {pair[1].shape[-1] for pair in theirs.adapter.pairs.values()} == {6}
    for name, (A, B) in ours.adapter.pairs.items():
        factor = scale(ours.adapter.settings[name]) / scale(theirs.adapter.settings[name])
        A_theirs, B_theirs = theirs.adapter.pairs[name]
        rank = B.shape[-1]
        assert torch.equal(A_theirs[..., :rank, :], A) and not A_theirs[..., rank:, :].any() and not B_theirs[..., rank:].any()
        if math.log2(factor).is_integer():
            assert torch.equal(B_theirs[..., :rank], B * factor)
        else:
            assert torch.allclose(B_theirs[..., :rank].double(), B.double() * factor, rtol=2**-24, atol=1e-44)


def test_modules_alike_are_left_as_they_are(place, hybrid_dir):
    adapter = open_adapter(place(Lora(rank=3, alpha=5, targets=ALL)), hybrid_dir).adapter
    assert same_scale(adapter) is adapter


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (ALL, ["in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
        (("mlp", "attention"), ["q_proj", "k_proj", "v_proj", "o_proj", "mixer.up_proj", "mixer.down_proj"]),
        (("shared_experts",), ["shared_experts.up_proj", "shared_experts.down_proj"]),
        (("experts",), [f"{expert}.{p}_proj" for p in ("up", "down") for expert in range(6)]),
        (("layers.1.mixer.shared_experts.up_proj",), ["1.mixer.shared_experts.up_proj"]),
    ],
)
def test_target_modules_for_vllm_name_what_is_adapted_and_no_more(place, hybrid_dir, targets, expected):
    theirs = through(place(Lora(rank=2, targets=targets)), hybrid_dir, plan_for_vllm)
    config = json.loads((theirs / CONFIG).read_text())
    assert sorted(config["target_modules"]) == sorted(expected) and config["target_parameters"] is None


def test_vllm_s_form_has_the_checkpoint_s_names_and_two_dims(place, hybrid_dir):
    theirs = load_file(through(place(Lora(rank=2, targets=("experts",))), hybrid_dir, plan_for_vllm) / WEIGHTS)
    assert len(theirs) == 2 * 2 * 6 * 2 and {tensor.ndim for tensor in theirs.values()} == {2}
    assert theirs["base_model.model.backbone.layers.5.mixer.experts.3.down_proj.lora_B.weight"].shape == (32, 2)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (Lora(rank=2, dora=True, targets=("attention", "mlp")), "lora.dora: 6 modules have DoRA's magnitudes, which vLLM does not read"),
        (
            Lora(rank=2, targets=("embeddings", "q_proj")),
            "lora.targets: backbone.embeddings .one of 1. is adapted, which vLLM does not read",
        ),
        (Lora(rank=2, targets=("lm_head", "q_proj")), "lora.targets: lm_head .one of 1. is adapted, which vLLM does not read"),
        (Lora(rank=513, targets=("q_proj",)), "lora.rank: got 513, and vLLM serves ranks up to 512"),
    ],
)
def test_what_vllm_cannot_read_is_refused(place, hybrid_dir, lora, words):
    with pytest.raises(UnsupportedError, match=f"{words}(.|\n)*[Mm]erge the adapter"):
        plan_for_vllm(open_adapter(place(lora), hybrid_dir))


def test_latent_projections_are_refused_for_vllm(tmp_path):
    make("latent").save_pretrained(tmp_path / "base")
    model, lora = load_model(tmp_path / "base", dtype="float32"), Lora(rank=2, targets=("latent", "q_proj"))
    apply_lora(model, lora)
    save_adapter(model, tmp_path / "adapter", lora, base="base")
    with pytest.raises(UnsupportedError, match=r"lora.targets: backbone.layers.1.mixer.fc1_latent_proj \(one of 4\) .*past its adapter"):
        plan_for_vllm(open_adapter(tmp_path / "adapter", tmp_path / "base"))


@pytest.mark.parametrize(
    "lora", [Lora(rank=2, dora=True, rslora=True, targets=("attention", "mlp", "lm_head")), Lora(rank=2, targets=("embeddings", "q_proj"))]
)
def test_dora_and_embeddings_come_back_from_peft_s_form_to_the_bit(place, hybrid_dir, lora):
    ours = place(lora)
    assert_same_file(ours, through(ours, hybrid_dir, plan_for_peft))


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (32, 32), (33, 64), (400, 512)])
def test_vllm_is_told_a_rank_that_it_takes(place, hybrid_dir, rank, served):
    assert vllm_max_rank(open_adapter(place(Lora(rank=rank, targets=("k_proj",))), hybrid_dir).adapter) == served


def test_values_keep_their_dtype(place, hybrid_dir):
    ours = place(Lora(rank=2, targets=ALL))
    save_file({name: tensor.bfloat16() for name, tensor in load_file(ours / WEIGHTS).items()}, ours / WEIGHTS)
    theirs = load_file(through(ours, hybrid_dir, plan_for_vllm) / WEIGHTS)
    assert {tensor.dtype for tensor in theirs.values()} == {torch.bfloat16}
    back = through(ours, hybrid_dir, plan_for_vllm, plan_for_peft)
    assert (back / WEIGHTS).read_bytes() == (through(ours, hybrid_dir, plan_for_peft) / WEIGHTS).read_bytes()


def test_the_base_is_the_one_that_the_adapter_names(place, hybrid_dir):
    theirs = through(place(Lora(rank=2, targets=("q_proj",))), hybrid_dir, plan_for_vllm)
    assert json.loads((theirs / CONFIG).read_text())["base_model_name_or_path"] == "nvidia/base"


@pytest.mark.parametrize("plan", [plan_for_peft, plan_for_vllm])
def test_a_wrong_value_is_never_called_done(place, hybrid_dir, tmp_path, monkeypatch, plan):
    from nemotune.lora.forms import Entry

    right = Entry.of
    monkeypatch.setattr(Entry, "of", lambda self, whole: right(self, whole).flip(0))
    with pytest.raises(CheckpointError, match="modules read back are not what was to be written"):
        write(plan(open_adapter(place(Lora(rank=2, targets=("experts",))), hybrid_dir)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_there_stays(place, hybrid_dir, tmp_path):
    ours = place(Lora(rank=2, targets=("q_proj",)))
    plan = plan_for_vllm(open_adapter(ours, hybrid_dir))
    write(plan, tmp_path / "out")
    with pytest.raises(ConflictError, match="already exists"):
        write(plan, tmp_path / "out")


@settings(max_examples=4, deadline=None)
@given(targets=BLOCKS, rank=st.integers(1, 4), alpha=st.sampled_from([1, 8, 3.5]))
def test_an_adapter_comes_back_from_megatron_s_form_to_the_bit(place, hybrid_dir, targets, rank, alpha):
    """By values, ranks and scales: q, k and v, which Megatron fuses, take a pattern to say them."""
    ours = open_adapter(place(Lora(rank=rank, alpha=alpha, targets=tuple(targets))), hybrid_dir)
    back = open_adapter(through(ours.directory, hybrid_dir, plan_lora, plan_for_peft), hybrid_dir).adapter
    assert back.settings.keys() == ours.adapter.settings.keys()
    for name, its in ours.adapter.settings.items():
        assert (back.settings[name].rank, scale(back.settings[name])) == (its.rank, scale(its))
        for one, other in zip(back.pairs[name], ours.adapter.pairs[name], strict=True):
            assert torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32)), name


def test_megatron_s_own_tokenizer_goes_with_the_adapter(place, hybrid_dir, tmp_path):
    written = through(place(Lora(rank=2, targets=("q_proj",))), hybrid_dir, plan_lora)
    (iteration,) = written.glob("iter_*")
    (iteration / "tokenizer" / "chat_template.jinja").write_text("as trained")
    back = through(written, hybrid_dir, plan_for_peft)
    assert (back / "chat_template.jinja").read_text() == "as trained" and not (back / "metadata.json").exists()
