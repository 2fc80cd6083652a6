"""Published rows, NVIDIA's templates and the reconstructed tokenizers. Skipped without NEMOTUNE_TEST_DATA."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from nemotune.data.example import Example, RowError, conversation
from nemotune.data.formats import FORMATS
from nemotune.data.prepare import prepare
from nemotune.data.sources import iter_rows
from nemotune.data.template import Renderer
from nemotune.recipe.schema import Recipe, Source

ROOT = os.environ.get("NEMOTUNE_TEST_DATA")
pytestmark = pytest.mark.skipif(ROOT is None, reason="NEMOTUNE_TEST_DATA names no folder of published rows")
DATA = Path(ROOT or ".") / "data"
TEMPLATES = DATA / "nemotron" / "chat_templates"
NVIDIA = [
    "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_nano_training", "nemotron_3_super_training",
    "nemotron_3_ultra_training", "nvidia_nemo_data_prep_nano3", "nvidia_nemo_data_prep_lightning35",
]  # fmt: skip
GLAIVE = DATA / "glaive" / "raw_format_reconstructed_300.jsonl"


def template(name):
    return str(TEMPLATES / f"{name}.jinja")


def reconstructed(name, **tokens):
    text = gzip.decompress((DATA / "nemotron" / "tokenizer" / f"{name}_tokenizer.RECONSTRUCTED.json.gz").read_bytes()).decode()
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **tokens)


def recipe_of(**data):
    return Recipe.model_validate({"name": "test", "model": {"path": "unused"}, "data": data})


@pytest.fixture(scope="module")
def nemotron():
    return reconstructed("nemotron3", bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>")


@pytest.fixture(scope="module")
def llama():
    return reconstructed("llama3_1", bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


@pytest.fixture(scope="module")
def glaive():
    return [FORMATS["glaive"](row) for row in iter_rows(Source(path=str(GLAIVE)))]


def without_system(example):
    return [message for message in example.messages if message["role"] != "system"]


def test_every_glaive_row_agrees_with_its_converted_twin(glaive):
    twins = [FORMATS["chat"](row) for row in iter_rows(Source(path=str(DATA / "glaive" / "glaive_toolcall_en_demo.json")))]
    assert len(glaive) == len(twins) == 300
    for ours, twin in zip(glaive, twins, strict=True):
        assert without_system(ours) == without_system(twin)
        assert ours.tools == twin.tools
    assert sum(len(message.get("tool_calls", ())) for example in glaive for message in example.messages) == 211


def test_chatml_gives_real_raw_rows_back_as_text(nemotron):
    """The literal form: the row's own text between ChatML's tokens, nothing added, nothing lost."""
    renderer = Renderer(nemotron, template="chatml", train_on="all")
    for row in iter_rows(Source(path=str(DATA / "glaive" / "raw_real_rows_0-4.jsonl"))):
        turns = row["chat"].strip().replace(" <|endoftext|>", "").split("\n\n\n")
        roles = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
        parts = [f"system\n{row['system'].removeprefix('SYSTEM: ').strip()}"]
        parts += [f"{roles[head]}\n{text}" for head, text in (turn.split(": ", 1) for turn in turns)]
        (encoded,) = renderer.encode(FORMATS["glaive"](row))
        assert nemotron.decode(encoded.tokens) == "".join(f"<|im_start|>{part}<|im_end|>\n" for part in parts)


@pytest.mark.parametrize("name", NVIDIA)
def test_every_glaive_row_renders_with_nvidias_templates(nemotron, glaive, name):
    renderer = Renderer(nemotron, template=template(name))
    think = nemotron.convert_tokens_to_ids(["<think>", "</think>"])
    for example in glaive[::3]:
        (encoded,) = renderer.encode(example)
        assert not any(mask for token, mask in zip(encoded.tokens, encoded.mask, strict=True) if token in think)
        ends = [i for i, mask in enumerate(encoded.mask) if mask and (i + 1 == len(encoded.mask) or not encoded.mask[i + 1])]
        assert {encoded.tokens[i] for i in ends} == renderer.stop_ids == {nemotron.convert_tokens_to_ids("<|im_end|>")}
        turns = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        assert len(ends) == len(turns)
        for number in turns:
            prompt = renderer.prompt_tokens(example, turn=number)
            assert encoded.tokens[: len(prompt)] == prompt and encoded.mask[len(prompt)] and not encoded.mask[len(prompt) - 1]


@pytest.mark.parametrize("name", ["nemotron_3_nano_training", "nemotron_3_super_training", "nemotron_3_ultra_training"])
def test_mask_equals_the_templates_own_marks_minus_the_generation_prompt(nemotron, glaive, name):
    """Against transformers' own mask: less `<think></think>`, less the line break after `<|im_end|>`, it is ours."""
    renderer = Renderer(nemotron, template=template(name))
    think, newline = nemotron.convert_tokens_to_ids(["<think>", "</think>"]), nemotron.encode("\n", add_special_tokens=False)
    source = Path(template(name)).read_text(encoding="utf-8")
    for example in glaive[::10]:
        (encoded,) = renderer.encode(example)
        theirs = nemotron.apply_chat_template(
            list(example.messages),
            tools=list(example.tools) or None,
            chat_template=source,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens, marks = theirs["input_ids"], [bool(mark) for mark in theirs["assistant_masks"]]
        for i, token in enumerate(tokens):
            after_end = i > 0 and tokens[i - 1] in renderer.stop_ids
            if token in think or (after_end and [token] == newline):
                marks[i] = False
        length = len(encoded.tokens)
        assert tokens[:length] == encoded.tokens and marks[:length] == encoded.mask and not any(marks[length:])


REASONED = Example(
    messages=(
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4.", "reasoning_content": "Two and two."},
        {"role": "user", "content": "And 3 + 3?"},
        {"role": "assistant", "content": "6.", "reasoning_content": "Three and three."},
    )
)


@pytest.mark.parametrize("name", NVIDIA)
def test_nvidias_truncated_history_makes_each_turn_a_sample(nemotron, name):
    renderer = Renderer(nemotron, template=template(name))
    first, second = renderer.encode(REASONED)
    texts = [nemotron.decode([t for t, mask in zip(e.tokens, e.mask, strict=True) if mask]) for e in (first, second)]
    assert [text.replace("\n", "") for text in texts] == ["Two and two.</think>4.<|im_end|>", "Three and three.</think>6.<|im_end|>"]
    assert "Two and two." not in nemotron.decode(second.tokens)
    assert nemotron.decode(renderer.prompt_tokens(REASONED)).endswith("<|im_start|>assistant\n<think>\n")


def test_builtin_template_renders_conversations_as_nvidias_does(nemotron, glaive):
    ours, nvidias = Renderer(nemotron), Renderer(nemotron, template=template("nemotron_3_nano"))
    assert ours.template_name.startswith("built-in nemotron3")
    for example in [example for example in glaive if not example.tools][:20]:
        assert ours.encode(example) == nvidias.encode(example)


def test_template_without_tools_is_refused_for_rows_that_have_them(nemotron, glaive):
    renderer = Renderer(nemotron, template=template("axolotl_nemotron_h"))
    for example in glaive[:40]:
        if example.tools:
            with pytest.raises(RowError, match="the template leaves tools out"):
                renderer.encode(example)
        else:
            assert len(renderer.encode(example)) == 1


def test_nano_v2_template_is_switched_by_its_system_message(glaive):
    """Its calls lack the `<think></think>` that its generation prompt ends with: those rows are rejected, not mistrained."""
    tokenizer = reconstructed("nemotron3", bos_token="<s>", eos_token="<SPECIAL_12>", extra_special_tokens=["<SPECIAL_10>", "<SPECIAL_11>"])
    renderer = Renderer(tokenizer, template=template("llamacpp_NVIDIA-Nemotron-Nano-v2"))
    example = Example(messages=conversation(("user", "Hello"), ("assistant", "Hi.")))
    (encoded,) = renderer.encode(example)
    assert tokenizer.decode(encoded.tokens).endswith("<SPECIAL_11>Assistant\n<think></think>Hi.\n<SPECIAL_12>")
    assert tokenizer.decode([t for t, mask in zip(encoded.tokens, encoded.mask, strict=True) if mask]) == "Hi.\n<SPECIAL_12>"
    calling = next(example for example in glaive if any("tool_calls" in message for message in example.messages))
    with pytest.raises(RowError, match="not a token prefix"):
        renderer.encode(calling)


def test_llama_rows_render_with_the_builtin_template(llama, glaive):
    renderer = Renderer(llama)
    assert renderer.template_name.startswith("built-in llama3")
    assert all(len(renderer.encode(example)) == 1 for example in glaive[::10])
    assert renderer.stop_ids == {llama.eos_token_id}


@pytest.mark.parametrize(
    ("row_format", "path", "count"),
    [("medmcqa", "medmcqa/dev_first3000.jsonl", 3000), ("fiqa", "fiqa/test.jsonl", 480), ("squad", "squad/xquad_en.hf_schema.jsonl", 1190)],
)
def test_every_published_row_is_usable(row_format, path, count):
    examples = [FORMATS[row_format](row) for row in iter_rows(Source(path=str(DATA / path)))]
    assert len(examples) == count
    assert all(example.prompt.endswith("Answer:") and example.completion.startswith(" ") for example in examples)


def test_raw_medmcqa_trains_one_letter_and_the_end(nemotron):
    renderer = Renderer(nemotron, template="none")
    letters = {nemotron.encode(f" {letter}", add_special_tokens=False)[0]: letter for letter in "ABCD"}
    for row in list(iter_rows(Source(path=str(DATA / "medmcqa" / "dev_first3000.jsonl"))))[:200]:
        example = FORMATS["medmcqa"](row)
        (encoded,) = renderer.encode(example)
        letter, end = [t for t, mask in zip(encoded.tokens, encoded.mask, strict=True) if mask]
        assert letters[letter] == example.meta["answer"] and end == nemotron.eos_token_id


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row_format", "path", "rows"),
    [
        ("medmcqa", "medmcqa/dev_first3000.jsonl", 400),
        ("fiqa", "fiqa/test.jsonl", 480),
        ("glaive", str(GLAIVE), 300),
        ("squad", "squad/xquad_en.hf_schema.jsonl", 400),
    ],
)
def test_published_rows_prepare_and_none_is_lost(nemotron, tmp_path, row_format, path, rows):
    recipe = recipe_of(
        format=row_format,
        train=str(DATA / path),
        max_samples=rows,
        validation=0.05,
        test=0.1,
        sequence_length=2048,
        template=template("nemotron_3_nano"),
    )
    prepared = prepare(recipe, nemotron, out_dir=tmp_path / "data", cache_dir=tmp_path / "cache")
    stats = prepared.stats
    written = sum(split["rows"] for split in stats["splits"].values())
    rejected = sum(entry["count"] for entry in stats["sources"]["train"]["rejected"].values())
    assert stats["sources"]["train"]["rows"] == rows == written + rejected
    assert rejected == sum(split["dropped"] for split in stats["splits"].values())
    assert stats["splits"]["train"]["fill_rate"] > 0.9  # the last row of so few is part empty
    assert json.dumps(stats)
