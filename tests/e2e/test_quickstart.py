"""The quickstart as it ships, scored on half the rows: it teaches, leaves every promised file, and the merged model calls tools in transformers."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM

from nemotune import assets
from nemotune.data.prepare import Prepared
from nemotune.data.template import Renderer
from nemotune.evaluate.calls import parse_reply, typed
from nemotune.export.gguf import llama_cpp
from nemotune.export.gguf.plan import plan_gguf
from nemotune.export.stream import write
from nemotune.export.tuned import open_tuned
from nemotune.generate import generate
from nemotune.models import load_model, load_tokenizer
from nemotune.train.metrics import read_metrics

PROMISED = (
    "recipe.json", "environment.json", "coverage.json", "metrics.jsonl", "data/stats.json", "data/train.jsonl", "data/test.jsonl",
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/tokenizer.json", "adapter/chat_template.jinja",
    "eval/base.jsonl", "eval/tuned.jsonl", "eval/compare.json", "export/merged/model.safetensors", "report.html",
)  # fmt: skip


def test_quickstart_teaches_and_leaves_what_it_promises(nemotune, tmp_path):
    result = nemotune("run", "quickstart", "evaluate.max_samples=80")
    assert result.returncode == 0, result.stdout
    run_dir = tmp_path / "runs" / "quickstart"
    assert [name for name in PROMISED if not (run_dir / name).is_file()] == []
    assert list((run_dir / "tensorboard").iterdir()) and list((run_dir / "checkpoints").glob("step_*"))
    losses = [row["loss"] for row in read_metrics(run_dir) if row["kind"] == "eval"]
    assert losses[-1] < 0.75 * losses[0]
    exact = json.loads((run_dir / "eval" / "compare.json").read_text())["groups"]["tool_calls"]["group"]["held-out arguments"]["exact"]
    assert exact["base"] < 0.05 and exact["tuned"] > 0.8
    page = (run_dir / "report.html").read_text()
    assert "held-out arguments" in page and "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page
    merged_equals_transformers(run_dir)
    if llama_cpp.is_installed():
        gguf_calls_tools_as_the_merged_model(run_dir)


def merged_equals_transformers(run_dir):
    """Greedy native generation gives transformers' tokens on the merged model, stop tokens included."""
    merged = run_dir / "export" / "merged"
    ours = load_model(merged, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = tuple(theirs.config.time_step_limit)
    renderer = Renderer(load_tokenizer(merged))
    prompts = [renderer.prompt_tokens(example, turn=1) for example in list(Prepared.load(run_dir / "data").test.examples())[:6]]
    stops = set(theirs.generation_config.eos_token_id)
    assert stops == {2, 11}
    answers = generate(ours, prompts, max_new_tokens=60, stop_ids=stops)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert theirs.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, len(prompt) :].tolist() == answer
    assert all(answer[-1] == 11 for answer in answers)


def gguf_calls_tools_as_the_merged_model(run_dir):
    """An f16 file of base and adapter: llama.cpp says the merged model's tokens, and its server reads the same calls from the same requests."""
    path = run_dir / "export" / "quickstart-f16.gguf"
    write(plan_gguf(open_tuned(assets.resolve("nemotron-tiny"), run_dir / "adapter"), "f16"), path)
    merged = run_dir / "export" / "merged"
    tokenizer, model = load_tokenizer(merged), load_model(merged, dtype="float32")
    examples = list(Prepared.load(run_dir / "data").test.examples())[:6]
    prompts = [Renderer(tokenizer).prompt_tokens(example, turn=1) for example in examples]
    answers = generate(model, prompts, max_new_tokens=60, stop_ids={2, 11})
    assert llama_cpp.generate(path, prompts, max_new_tokens=60, stop_ids={2, 11}) == answers
    switch = {"chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 60}
    asked = [{"messages": list(example.messages[:1]), "tools": list(example.tools), **switch} for example in examples]
    for example, answer, served in zip(examples, answers, llama_cpp.chat(path, asked), strict=True):
        ours = [(call.name, typed(call, example.tools).arguments) for call in parse_reply(tokenizer.decode(answer)).calls]
        theirs = [call["function"] for call in served["choices"][0]["message"]["tool_calls"]]
        assert ours == [(call["name"], json.loads(call["arguments"])) for call in theirs] != []
