"""An adapter as a GGUF file: llama.cpp with base and adapter computes what the adapter computes here; what it would leave out is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from toy_gguf import saved

from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.export.adapters.gguf_file import plan_for_llama_cpp
from nemotune.export.adapters.opened import open_adapter
from nemotune.export.gguf import llama_cpp
from nemotune.export.gguf.plan import plan_gguf
from nemotune.export.stream import write
from nemotune.export.tuned import open_tuned
from nemotune.lora import LoRAEmbedding, apply_lora, lora_modules, save_adapter
from nemotune.models import load_model
from nemotune.recipe import Lora

TOKENS = torch.randint(0, 1504, (23,), generator=torch.Generator().manual_seed(1))
BORDERS = torch.tensor([0, 23], dtype=torch.int32)
BASES = {
    "hybrid": ("hybrid", {"hybrid_override_pattern": "ME*E"}),
    "dense": ("hybrid", {"hybrid_override_pattern": "M*-M"}),
    "mixed": ("hybrid", {}),
    "latent": ("latent", {"hybrid_override_pattern": "ME*E"}),
    "llama": ("llama", {}),
    "llama_tied": ("llama_tied", {}),
}
EVERY = ("attention", "mamba", "shared_experts", "experts", "embeddings", "lm_head")
CASES = {
    "every_module": ("hybrid", Lora(rank=4, alpha=8, targets=EVERY)),
    "rslora": ("hybrid", Lora(rank=3, alpha=5, rslora=True, targets=("experts", "mamba"))),
    "ranks_and_scales": ("hybrid", Lora(rank=4, alpha=8, targets=EVERY, rank_pattern={"experts": 2, "q_proj": 7}, alpha_pattern={"mamba": 3, "embeddings": 32})),
    "dense_layers": ("dense", Lora(rank=4, alpha=8, targets=("mlp", "attention", "mamba"))),
    "beside_dense_layers": ("mixed", Lora(rank=4, alpha=8, targets=("experts", "shared_experts", "attention"))),
    "latent_experts": ("latent", Lora(rank=4, alpha=8, targets=("experts", "shared_experts"))),
    "rotated_rows": ("llama", Lora(rank=4, alpha=8, targets=("attention", "mlp", "embed_tokens", "lm_head"))),
    "tied": ("llama_tied", Lora(rank=4, alpha=8)),
}  # fmt: skip


@pytest.fixture(scope="module")
def based(tmp_path_factory):
    """Gives a base as Hugging Face has it and, where it is asked for, as a GGUF file, each made once."""
    made = {}

    def base(name):
        if name not in made:
            variant, config = BASES[name]
            made[name] = saved(tmp_path_factory.mktemp(name) / "base", variant, **config)
        return made[name]

    return base


def adapted(base, directory, lora):
    """Our model with an adapter whose every value matters, which is saved."""
    model = load_model(base, dtype="float32")
    apply_lora(model, lora)
    with torch.no_grad():
        for seed, (_, layer) in enumerate(lora_modules(model)):
            begins_at_zero = layer.lora_embedding_A if isinstance(layer, LoRAEmbedding) else layer.lora_B
            begins_at_zero.normal_(0, 0.2, generator=torch.Generator().manual_seed(seed))
    save_adapter(model, directory, lora, base="base")
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same_from_base_and_adapter(based, case, tmp_path):
    pytest.importorskip("xllamacpp")
    name, lora = CASES[case]
    base = based(name)
    file = base.parent / "base.gguf"
    if not file.exists():
        write(plan_gguf(open_tuned(base), "f32"), file)
    ours = adapted(base, tmp_path / "adapter", lora)
    expected = ours.logits(ours(TOKENS, BORDERS)).detach().numpy()
    plain = load_model(base, dtype="float32").eval()
    unadapted = plain.logits(plain(TOKENS, BORDERS)).detach().numpy()
    write(plan_for_llama_cpp(open_adapter(tmp_path / "adapter", base)), tmp_path / "adapter.gguf")
    (got,) = llama_cpp.logits(file, [TOKENS.tolist()], adapter=tmp_path / "adapter.gguf")
    assert np.abs(expected - unadapted).max() > 0.05 * np.abs(expected).max(), "the adapter must matter"
    assert np.abs(got - expected).max() < 1e-3 * np.abs(expected).max()


def test_the_file_has_the_adapter_s_values(based, tmp_path):
    base = based("hybrid")
    adapted(base, tmp_path / "adapter", Lora(rank=2, alpha=8, targets=("experts", "k_proj")))
    opened = open_adapter(tmp_path / "adapter", base)
    assert write(plan_for_llama_cpp(opened), tmp_path / "adapter.gguf") == 2 * (1 + 2 * 2)
    reader = GGUFReader(tmp_path / "adapter.gguf")
    keys = {key: reader.fields[key].contents() for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")}
    assert list(keys.values()) == ["nemotron_h_moe", "adapter", "lora", 8.0]
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    A, B = opened.adapter.pairs["backbone.layers.3.mixer.experts.down_proj"]
    assert torch.equal(found["blk.3.ffn_down_exps.weight.lora_a"], A) and torch.equal(found["blk.3.ffn_down_exps.weight.lora_b"], B)
    A, B = opened.adapter.pairs["backbone.layers.2.mixer.k_proj"]
    rows = [head * 8 + half * 4 + i for head in range(2) for i in range(4) for half in range(2)]  # pairs, where Hugging Face has halves
    assert torch.equal(found["blk.2.attn_k.weight.lora_a"], A) and torch.equal(found["blk.2.attn_k.weight.lora_b"], B[rows])


@pytest.mark.parametrize(
    ("name", "lora", "words"),
    [
        (
            "latent",
            Lora(rank=2, targets=("latent", "q_proj")),
            r"fc1_latent_proj \(one of 4\): is multiplied without adapters in its graph",
        ),
        ("mixed", Lora(rank=2, targets=("mlp", "q_proj")), r"3\.mixer\.up_proj \(one of 2\): is a dense layer beside experts"),
        ("llama_tied", Lora(rank=2, targets=("lm_head",)), r"lm_head \(one of 1\): is tied to the embeddings"),
        ("llama", Lora(rank=2, targets=("attention",), dora=True), r"q_proj \(one of 12\): has DoRA's magnitudes"),
    ],
)
def test_what_llama_cpp_would_leave_as_it_is_is_refused(based, name, lora, words, tmp_path):
    adapted(based(name), tmp_path / "adapter", lora)
    with pytest.raises(UnsupportedError, match=f"lora.targets: .*{words}(.|\n)*write a GGUF file of base and adapter instead"):
        plan_for_llama_cpp(open_adapter(tmp_path / "adapter", based(name)))


def test_a_byte_that_changed_on_its_way_is_never_called_done(based, tmp_path, monkeypatch):
    from nemotune.export.adapters import gguf_file

    base = based("hybrid")
    adapted(base, tmp_path / "adapter", Lora(rank=2, targets=("experts",)))
    right, calls = gguf_file.bytes_of, iter(range(100))
    monkeypatch.setattr(gguf_file, "bytes_of", lambda tensor: right(tensor + 1e-3 if next(calls) == 3 else tensor))
    with pytest.raises(CheckpointError, match=r"1 of 8 tensors read back are not what was to be written, first blk"):
        write(plan_for_llama_cpp(open_adapter(tmp_path / "adapter", base)), tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()
