"""The card of a published model: what its front matter and its text tell, and what they keep to themselves."""

from __future__ import annotations

from functools import partial

import pytest
import yaml
from huggingface_hub import ModelCard
from toy_published import make_run

from nemotune.errors import DataError
from nemotune.export.hub.card import AdapterLoads, check_card
from nemotune.export.hub.license import Base, License, license_of
from nemotune.recipe import load
from nemotune.workflow.model_card import card_of

OPEN = License("other", "nvidia-open-model-license", "https://example.com/terms")
ANYWHERE = AdapterLoads()
NANO = Base("nvidia/NVIDIA-Nemotron-Nano-9B-v2", True, OPEN)
COMMUNITY = "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."


def render(tmp_path, *overrides, kind="adapter", base=NANO, repo="me/toy", files=(), adapter=ANYWHERE) -> str:
    run_dir = make_run(tmp_path, *overrides)
    return card_of(load(str(run_dir)), run_dir, repo=repo, kind=kind, base=base, files=files, adapter=adapter).render()


@pytest.mark.parametrize(
    ("kind", "library", "relation", "loads"),
    [
        ("adapter", "peft", "adapter", 'PeftModel.from_pretrained(base, "me/toy")'),
        ("model", "transformers", "finetune", 'AutoModelForCausalLM.from_pretrained("me/toy"'),
        ("gguf", "gguf", "quantized", "llama-server -hf me/toy -hff model-q4_k_m.gguf"),
    ],
)
def test_front_matter_is_the_hubs_and_says_how_it_is_loaded(tmp_path, kind, library, relation, loads):
    text = render(tmp_path, kind=kind, files=["model-q4_k_m.gguf"])
    data = ModelCard(text).data
    assert (data.library_name, data.base_model, data.base_model_relation) == (library, NANO.name, relation)
    assert (data.license, data.license_name, data.license_link) == ("other", OPEN.name, OPEN.link)
    assert data.pipeline_tag == "text-generation" and {"nemotune", "lora"} <= set(data.tags)
    assert loads in text


def test_ollama_is_named_only_where_it_asks_by_the_files_template(tmp_path):
    run_dir = make_run(tmp_path)
    card = partial(card_of, load(str(run_dir)), run_dir, repo="me/toy", kind="gguf", base=NANO, files=["m.gguf"], adapter=ANYWHERE)
    assert "ollama run hf.co/me/toy" in card(in_ollama=True).render() and "for llama.cpp and Ollama, of" in card(in_ollama=True).render()
    text = card(in_ollama=False).render()
    assert "ollama run" not in text and "for llama.cpp, of" in text and "Not for Ollama" in text


def test_metrics_are_in_the_index_and_in_the_table_with_their_intervals(tmp_path):
    text = render(tmp_path)
    exact, loss = ModelCard(text).data.eval_results
    assert (exact.metric_type, exact.metric_value, exact.dataset_type) == ("exact", 0.875, "private")
    assert exact.metric_args == {"base": 0.25, "difference": 0.625, "low": 0.41, "high": 0.79, "confidence": 0.95, "n": 24}
    assert loss.metric_value == 1.25 and "low" not in loss.metric_args
    assert "| tool_calls | exact | 25.0 % | 87.5 % | +62.5 | +41.0 to +79.0 | 24 |" in text
    assert "| perplexity | loss | 2.500 | 1.250 | -1.250 | under 15 rows | 3 |" in text


def test_without_an_evaluation_it_says_so(tmp_path):
    run_dir = make_run(tmp_path)
    (run_dir / "eval" / "compare.json").unlink()
    text = card_of(load(str(run_dir)), run_dir, repo="me/toy", kind="model", base=NANO, files=[], adapter=AdapterLoads()).render()
    assert ModelCard(text).data.eval_results is None and "Not measured against its base." in text


def test_what_training_came_to_is_told(tmp_path):
    text = render(tmp_path, "model.quantization=nf4", "data.thinking=true")
    for line in (
        "| adapter | rank 2, alpha 4, dropout 0, targets default |", "| steps | 40 (2.00 epochs) |", "| tokens | 360,000 |",
        "| training rows | 1,234 |", "| versions | nemotune 0.1.0, torch 2.13.0, transformers 5.23.0, safetensors 0.8.0 |",
        "| hardware | 1 x NVIDIA L4 |", "| base while training | NF4, computing in bfloat16 |", "enable_thinking=True",
        "The adapter learned beside NF4 weights; on the 16-bit base its answers differ a little.",
    ):  # fmt: skip
        assert line in text


def test_recipe_is_whole_and_names_no_place_of_this_machine(tmp_path):
    template = tmp_path / "secret-customer" / "chat.jinja"
    text = render(tmp_path, f"data.template={template}", "engine.python=C:\\Users\\jo\\python.exe")
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["model"]["path"] == NANO.name and recipe["lora"]["rank"] == 2
    assert recipe["data"]["train"]["path"] == "rows.jsonl" and recipe["data"]["template"] == "chat.jinja"
    assert recipe["engine"]["python"] == "python.exe" and recipe["data"]["test"]["path"] == "nemotron-tiny/test"
    for secret in (str(tmp_path), "secret-customer", "secret_tool", "nobody may see", "Users"):
        assert secret not in text


def test_sets_of_the_hub_are_named_and_directories_are_none(tmp_path, monkeypatch):
    text = render(tmp_path, "data.train.path=glaiveai/glaive-function-calling-v2", "data.validation=owner/rows-v1.1")
    assert ModelCard(text).data.datasets == ["glaiveai/glaive-function-calling-v2", "owner/rows-v1.1"]
    assert ModelCard(text).data.eval_results[0].dataset_type == "glaiveai/glaive-function-calling-v2"
    assert "path: glaiveai/glaive-function-calling-v2" in text
    (tmp_path / "customer" / "rows").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = render(tmp_path / "other", "data.train.path=customer/rows")
    assert ModelCard(text).data.datasets is None and "customer" not in text


def test_base_that_is_no_hub_id_is_told_by_name_alone(tmp_path):
    text = render(tmp_path, base=Base("my-base", False, License("unknown")))
    data = ModelCard(text).data
    assert data.base_model is None and data.get("base_model_relation") is None and data.license == "unknown"
    assert "A LoRA adapter for `my-base`" in text and "The base names no licence." in text


@pytest.mark.parametrize(
    ("key", "has", "lacks"),
    [
        ("layers.1.mixer.q_proj.lora_A.weight", ["PeftModel", "--enable-lora"], []),
        ("layers.1.mixer.experts.lora_A.weight", ["PeftModel", "For vLLM, merge it first"], ["--enable-lora"]),
        ("layers.1.mixer.experts.7.up_proj.lora_A.weight", ["--enable-lora", "which PEFT leaves out without a word"], ["PeftModel"]),
        ("layers.1.mixer.out_proj.lora_A.weight", ["--enable-lora", "`out_proj`, which PEFT refuses"], ["PeftModel"]),
    ],
)
def test_adapter_is_shown_only_where_it_loads(tmp_path, key, has, lacks):
    text = render(tmp_path, adapter=AdapterLoads.of([f"base_model.model.model.{key}"]))
    assert all(part in text for part in has) and not [part for part in lacks if part in text]


def test_model_from_random_weights_has_no_base(tmp_path):
    text = render(
        tmp_path, "method=pretrain", "model.weights=random", "data.format=text", "evaluate.tasks=[]", "export.merged=false", kind="model"
    )
    data = ModelCard(text).data
    assert data.base_model is None and "A model trained from random weights in the shape of" in text


def test_llamas_terms_are_kept(tmp_path):
    terms = license_of("nvidia/Llama-3.1-Nemotron-Nano-8B-v1", None)
    assert terms.notice == f"Licensed by NVIDIA Corporation under the NVIDIA Open Model License\n{COMMUNITY}\n"
    owed = terms.owed("me/my-model", has_license_file=True)
    assert len(owed) == 1 and "begins with Llama" in owed[0]
    assert terms.owed("me/Llama-mine", has_license_file=True) == []
    text = render(tmp_path, base=Base("nvidia/Llama-3.1-Nemotron-Nano-8B-v1", True, terms))
    assert "**Built with Llama.**" in text and COMMUNITY in text and "https://llama.meta.com/llama3_1/use-policy" in text


@pytest.mark.parametrize(
    ("base", "name", "llama"),
    [
        ("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16", "nvidia-nemotron-open-model-license", None),
        ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "nvidia-open-model-license", None),
        ("nvidia/Llama-3.1-Nemotron-Nano-4B-v1.1", "nvidia-open-model-license", "3.1"),
        ("Llama-3_3-Nemotron-Super-49B-v1", "nvidia-open-model-license", "3.3"),
        ("nvidia/Nemotron-H-8B-Base-8K", "nvidia-internal-scientific-research-and-development-model-license", None),
        ("somebody/else", None, None),
    ],
)
def test_known_bases_have_their_licence(base, name, llama):
    found = license_of(base, None)
    assert (found.name, found.llama) == (name, llama)
    assert found.id == ("other" if name else "unknown")


def test_bases_own_card_wins_over_what_is_known_of_its_name(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: newer-license\nlicense_link: LICENSE\nbase_model: meta-llama/Llama-3.1-8B\n---\n\nText\n"
    )
    found = license_of("nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16", tmp_path)
    link = "https://huggingface.co/nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16/blob/main/LICENSE"
    assert found == License("other", "newer-license", link, llama="3.1")


def test_copy_of_an_agreement_is_asked_for_where_there_is_none():
    terms = license_of("nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16", None)
    assert "save the text of https://www.nvidia.com/" in terms.owed("me/toy", has_license_file=False)[0]
    assert terms.owed("me/toy", has_license_file=True) == []
    assert "for research and development" in license_of("nvidia/Nemotron-H-8B-Base-8K", None).owed("me/toy", has_license_file=True)[0]


@pytest.mark.parametrize("text", ["---\nlicense: [\n---\n", "No front matter.\n", "---\n- a\n---\n"])
def test_card_that_the_hub_would_not_take_is_refused(text):
    with pytest.raises(DataError, match="^README.md: its front matter"):
        check_card(text, "README.md")
