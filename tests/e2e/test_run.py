"""The whole run on a small random model, and what it leaves for others to load."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotune.data.prepare import Prepared
from nemotune.data.template import Renderer
from nemotune.generate import generate
from nemotune.models import load_model, load_tokenizer


def with_our_dt_limits(model):
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = tuple(model.config.time_step_limit)
    return model.eval()


def test_merged_model_answers_in_transformers_as_it_does_here(nemotune, recipe_file, tmp_path):
    """Greedy tokens, stop tokens included: with the tokenizer, template and generation settings of the merged directory alone."""
    result = nemotune("run", recipe_file, "export.merged=true", "export.gguf=[q8_0]", "train.max_steps=40", "train.learning_rate=3e-2")
    assert result.returncode == 0, result.stdout
    assert "updated tensors are base + adapter" in result.stdout
    assert "of what the context tells is lost" in result.stdout or "not loaded by llama.cpp" in result.stdout
    assert (tmp_path / "runs" / "trial" / "export" / "trial-q8_0.gguf").is_file()
    merged = tmp_path / "runs" / "trial" / "export" / "merged"
    prepared = Prepared.load(tmp_path / "runs" / "trial" / "data")
    renderer = Renderer(load_tokenizer(merged), template="model", thinking=False)
    prompts = [renderer.prompt_tokens(example) for example in prepared.test.examples()]
    ours = load_model(merged, dtype="float32").eval()
    stops = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert renderer.stop_ids <= set(stops)
    answers = generate(ours, prompts, max_new_tokens=24, stop_ids=stops)

    theirs = with_our_dt_limits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(merged)
    for example, prompt, answer in zip(prepared.test.examples(), prompts, answers, strict=True):
        rendered = tokenizer.apply_chat_template(
            list(example.messages[:-1]), add_generation_prompt=True, enable_thinking=False, return_dict=False
        )
        assert rendered == prompt
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
        assert out == answer
    assert any(answer[-1] in stops for answer in answers), "some answer has to end by itself"


def test_the_function_calling_recipe_takes_a_hybrid_as_its_base(nemotune, tmp_path):
    """What `finetune --model nemotron-tiny` does: the recipe's own base is a llama, and its targets have to be there in both families."""
    rows = ("data.train=nemotron-tiny/train.jsonl", "data.format=chat", "data.max_samples=20", "data.validation=0.1", "data.test=0.1")
    short = ("train.optimizer=adamw", "train.max_steps=2", "train.eval_every=null", "evaluate.max_samples=1", "evaluate.max_new_tokens=4")
    result = nemotune("run", "glaive-nano-4b", "model.path=nemotron-tiny", *rows, *short)
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "runs" / "glaive-nano-4b" / "adapter" / "adapter_model.safetensors").is_file()


def test_full_tuning_and_pretraining_leave_models_that_load(nemotune, recipe_file, small_model, tmp_path):
    full = nemotune("run", recipe_file, "name=full", "method=full", "train.max_steps=3")
    assert full.returncode == 0, full.stdout
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Story {i}: the fox met the hen by the river. " * 3}) + "\n" for i in range(20)))
    words = ("data.format=text", f"data.train={text}", "data.template=none", "data.overflow=split", "evaluate.tasks=[perplexity]")
    fresh = nemotune("run", recipe_file, "name=fresh", "method=pretrain", "model.weights=random", *words, "train.max_steps=3")
    assert fresh.returncode == 0, fresh.stdout
    for name in ("full", "fresh"):
        directory = tmp_path / "runs" / name / "model"
        model = AutoModelForCausalLM.from_pretrained(directory)
        base = load_model(small_model, dtype="float32")
        assert any(not torch.equal(p, base.state_dict()[n]) for n, p in load_model(directory, dtype="float32").state_dict().items())
        assert model.config.vocab_size == base.config.vocab_size
        assert (directory / "chat_template.jinja").is_file()
