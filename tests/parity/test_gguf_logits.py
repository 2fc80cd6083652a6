"""llama.cpp computes from our GGUF files what transformers computes from the model, and answers as we do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from random_models import with_our_dt_limits
from toy_gguf import TINY, saved
from transformers import AutoModelForCausalLM

from nemotune.data.template import Renderer
from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.export.gguf import llama_cpp
from nemotune.export.gguf.check import check, compare
from nemotune.export.gguf.plan import plan_gguf
from nemotune.export.stream import write
from nemotune.export.tuned import open_tuned
from nemotune.generate import generate
from nemotune.models import load_model, load_tokenizer

pytest.importorskip("xllamacpp")

STOPS = {2, 11}
# llama.cpp runs no hybrid without an attention layer: those variants have one here.
VARIANTS = {
    "hybrid": {}, "one_group": {}, "wide_heads": {}, "latent": {}, "no_conv_bias": {}, "groups_equal_heads": {"hybrid_override_pattern": "M*M-"},
    "grouped_router": {"hybrid_override_pattern": "EM*EE"}, "unnormalised_router": {"hybrid_override_pattern": "M*E"},
    "llama": {}, "llama_plain_rope": {}, "llama_tied": {}, "llama_biased": {},
}  # fmt: skip
# What llama.cpp cannot run is refused before a byte is written.
REFUSED = {"four_ways": "dense MLP beside latent experts", "groups_equal_heads": "no attention layer"}


def exported(directory, kind, path):
    write(plan_gguf(open_tuned(directory), kind), path)
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_f32_logits_equal_transformers(variant, tmp_path):
    saved(tmp_path / "model", variant, **VARIANTS[variant])
    model = with_our_dt_limits(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval())
    prompt = [7 * index % 1499 for index in range(90)]
    with torch.no_grad():
        theirs = model(torch.tensor([prompt])).logits[0].numpy()
    ours = llama_cpp.logits(exported(tmp_path / "model", "f32", tmp_path / "model.gguf"), [prompt])[0]
    assert np.abs(ours - theirs).max() < 1e-3  # measured 6e-6


@pytest.mark.parametrize("variant", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused(variant, tmp_path):
    saved(tmp_path / "model", variant)
    with pytest.raises(UnsupportedError, match=REFUSED[variant]):
        plan_gguf(open_tuned(tmp_path / "model"), "f32")


def test_a_file_of_another_model_is_found_out_by_its_logits(tmp_path):
    """The same weights, tokens and shapes under another RoPE: only what is computed differs."""
    saved(tmp_path / "scaled", "llama")
    saved(tmp_path / "plain", "llama_plain_rope")
    plan = plan_gguf(open_tuned(tmp_path / "scaled"), "f16")
    path = exported(tmp_path / "plain", "f16", tmp_path / "plain.gguf")
    with pytest.raises(CheckpointError, match="not the model that was exported"):
        check(path, open_tuned(tmp_path / "scaled"), "f16")
    assert write(plan, tmp_path / "scaled.gguf").run.not_checked is None


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory):
    """nemotron-tiny, which was trained, in every type."""
    root = tmp_path_factory.mktemp("gguf")
    return {kind: exported(TINY, kind, root / f"{kind}.gguf") for kind in ("f16", "q8_0", "q5_k_m", "q4_k_m")}


@pytest.fixture(scope="module")
def tiny_prompts():
    """Requests as the model is asked them: tools, a user, the assistant's turn begun."""
    rows = [json.loads(line) for line in (TINY / "test" / "arguments.jsonl").read_text().splitlines()[:12]]
    renderer = Renderer(load_tokenizer(TINY))
    return [renderer.prompt_tokens(row["messages"][:1], row["tools"]) for row in rows]


def test_quantised_files_lose_little_and_the_wider_the_less(tiny_files, tiny_prompts):
    logits = {kind: np.concatenate(llama_cpp.logits(path, tiny_prompts)) for kind, path in tiny_files.items()}
    found = {kind: compare(kind, logits["f16"], logits[kind]) for kind in ("q8_0", "q5_k_m", "q4_k_m")}
    bounds = {"q8_0": (0.0008, 0.97), "q5_k_m": (0.009, 0.93), "q4_k_m": (0.031, 0.9)}  # twice the measured 0.0004, 0.0043, 0.0155
    assert found["q8_0"].lost < found["q5_k_m"].lost < found["q4_k_m"].lost
    for kind, (lost, agreement) in bounds.items():
        assert found[kind].lost < lost and found[kind].agreement > agreement


def test_greedy_answers_equal_ours(tiny_files, tiny_prompts):
    ours = generate(load_model(TINY, dtype="float32"), tiny_prompts, max_new_tokens=24, stop_ids=STOPS)
    assert llama_cpp.generate(tiny_files["f16"], tiny_prompts, max_new_tokens=24, stop_ids=STOPS) == ours
    assert sum(answer[-1] == 11 for answer in ours) > 6


def test_the_server_asks_by_the_template_in_the_file(tiny_files, tiny_prompts):
    """llama.cpp's own Jinja engine makes as many tokens of a conversation with tools as transformers'."""
    rows = [json.loads(line) for line in (TINY / "test" / "arguments.jsonl").read_text().splitlines()[:3]]
    switch = {"chat_template_kwargs": {"enable_thinking": False}}
    asked = [{"messages": row["messages"][:1], "tools": row["tools"], "max_tokens": 1, **switch} for row in rows]
    counted = [answer["usage"]["prompt_tokens"] for answer in llama_cpp.chat(tiny_files["f16"], asked)]
    assert counted == [len(prompt) for prompt in tiny_prompts[:3]]
