"""GGUF files in llama.cpp: what it computes and how it splits texts is what the model and its tokenizer do; the bytes are llama-quantize's."""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from toy_gguf import edit_json, saved

from nemotune.export.gguf import llama_cpp
from nemotune.export.gguf.plan import plan_gguf
from nemotune.export.merge import merge
from nemotune.export.stream import write
from nemotune.export.tuned import open_tuned
from nemotune.lora import apply_lora, lora_modules, save_adapter
from nemotune.models import load_model, load_tokenizer
from nemotune.recipe import Lora

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.quantize import llama_cpp as packed_by_llama_cpp

pytest.importorskip("xllamacpp")
REAL = os.environ.get("NEMOTUNE_TEST_DATA")


@pytest.mark.parametrize(
    "config",
    [
        {"hybrid_override_pattern": "ME*-", "intermediate_size": 200},  # a dense layer of more units than the experts elsewhere have
        {"hybrid_override_pattern": "M-*"},  # dense, with experts in its config.json
        {"hybrid_override_pattern": "M*E", "vocab_size": 1507, "num_nextn_predict_layers": 1},
        {"hybrid_override_pattern": "EM*-", "n_group": 3, "topk_group": 2, "norm_topk_prob": False},
    ],
)
def test_what_others_write_so_that_it_does_not_load_computes_what_the_model_does(config, tmp_path):
    """See test_gguf_logits.py for every kind of layer."""
    tuned = open_tuned(saved(tmp_path / "model", "hybrid", **config))
    run = write(plan_gguf(tuned, "f32"), tmp_path / "model.gguf").run
    assert run.difference is not None and run.difference < 1e-3


def test_a_file_of_base_and_adapter_is_that_of_the_merged_model(tmp_path, monkeypatch):
    base = saved(tmp_path / "base", "hybrid", hidden_size=256, moe_intermediate_size=96)
    model, lora = (
        load_model(base, dtype="float32"),
        Lora(rank=4, alpha=8, targets=("attention", "mamba", "mlp", "shared_experts", "experts")),
    )
    apply_lora(model, lora)
    with torch.no_grad():
        for _, layer in lora_modules(model):
            layer.lora_B.normal_(0, 0.2, generator=torch.Generator().manual_seed(3))
    save_adapter(model, tmp_path / "adapter", lora, base=str(base))
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    for name, tuned in (("two", open_tuned(base, tmp_path / "adapter")), ("one", open_tuned(tmp_path / "merged"))):
        write(plan_gguf(tuned, "q4_k_m", name="same"), tmp_path / f"{name}.gguf")
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
    assert GGUFReader(tmp_path / "one.gguf").fields["tokenizer.chat_template"].contents() == "{{ messages }}"


@pytest.mark.parametrize(
    "variant, config",
    [
        ("llama", {"hidden_size": 256, "intermediate_size": 96}),
        ("llama_tied", {"hidden_size": 96, "intermediate_size": 512}),
        (
            "hybrid",
            {
                "hidden_size": 256,
                "moe_intermediate_size": 96,
                "moe_shared_expert_intermediate_size": 256,
                "hybrid_override_pattern": "ME*ME",
            },
        ),
        ("latent", {"hidden_size": 160, "moe_latent_size": 256, "moe_intermediate_size": 64}),
    ],
)
def test_bytes_are_those_of_llama_quantize(variant, config, tmp_path, monkeypatch):
    """It takes an f16 file; which type each tensor gets is held in tests/unit/export/gguf/test_plan.py."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    tuned = open_tuned(saved(tmp_path / "model", variant, **config))
    files = {kind: tmp_path / f"{kind}.gguf" for kind in ("f16", "q8_0", "q5_k_m", "q4_k_m")}
    for kind, path in files.items():
        write(plan_gguf(tuned, kind), path)
    wide, found = {tensor.name: tensor for tensor in GGUFReader(files["f16"]).tensors}, set()
    for kind in ("q8_0", "q5_k_m", "q4_k_m"):
        for tensor in GGUFReader(files[kind]).tensors:
            rows, same = wide[tensor.name].data, tensor.tensor_type == wide[tensor.name].tensor_type
            theirs = rows if same else packed_by_llama_cpp(torch.from_numpy(np.array(rows)).flatten(0, -2), tensor.tensor_type.name)
            assert np.array_equal(tensor.data.reshape(-1), theirs.reshape(-1)), (kind, tensor.name)
            found.add(tensor.tensor_type.name)
    assert found >= {"F32", "Q8_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K"}


def test_answers_end_at_every_token_that_ends_them(tmp_path):
    """config.json says 2, the tokenizer 11; llama.cpp does not know 7 by its text."""
    directory = saved(tmp_path / "model", "one_group")
    edit_json(directory / "generation_config.json", eos_token_id=[2, 11, 7])
    path = tmp_path / "model.gguf"
    write(plan_gguf(open_tuned(directory), "f16"), path)
    assert set(llama_cpp.tokenize(path, [])[1]) == {2, 7, 11}


@pytest.mark.skipif(not REAL, reason="NEMOTUNE_TEST_DATA")
@pytest.mark.parametrize("tokenizer", ["nemotron3", "llama3_1"])
def test_real_tokenizers_make_the_same_tokens(tokenizer, tmp_path):
    sources = Path(REAL or "") / "data" / "nemotron" / "tokenizer"
    with gzip.open(sources / f"{tokenizer}_tokenizer.RECONSTRUCTED.json.gz", "rt", encoding="utf-8") as file:
        text = file.read()
    vocab = json.loads(text)
    size = max(*vocab["model"]["vocab"].values(), *(token["id"] for token in vocab["added_tokens"])) + 1
    directory = saved(tmp_path / "model", "llama", vocab_size=size, hidden_size=8, num_hidden_layers=1, tie_word_embeddings=True)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    for name in ("generation_config.json", "chat_template.jinja"):
        (directory / name).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "is_installed", lambda: False)
        write(plan_gguf(open_tuned(directory), "f16"), tmp_path / "model.gguf")
    texts = (sources / "llama_bpe_test_vectors.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    texts += [
        Path(__file__).read_text(encoding="utf-8"),
        "HelloWorld McDonald's we'RE I'VE 12345678 3.14 a/\n\n/b https://x.y/\nz ÉcoleÀ straßeÄÖ МирТест",
    ]
    letters = [
        "a",
        "B",
        "é",
        "É",
        "Ж",
        "ж",
        "1",
        "23",
        " ",
        "  ",
        "\n",
        "'s",
        "'RE",
        "/",
        "//\n",
        "中",
        "。",
        "🚀",
        "\t",
        "_",
        "<|im_end|>",
        "</s>",
    ]
    texts += ["".join(random.Random(seed).choices(letters, k=40)) for seed in range(200)]
    hf = load_tokenizer(directory)
    theirs, _ = llama_cpp.tokenize(tmp_path / "model.gguf", texts)
    assert [text for text, tokens in zip(texts, theirs, strict=True) if hf.encode(text, add_special_tokens=False) != tokens] == []
