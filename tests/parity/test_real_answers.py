"""Published rows scored against themselves: every call that a template writes is read back as the row meant it."""

from __future__ import annotations

import gzip
import os
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from nemotune.data.formats import FORMATS
from nemotune.data.sources import iter_rows
from nemotune.data.template import Renderer
from nemotune.evaluate.calls import Call
from nemotune.evaluate.candidate import TURN_END
from nemotune.evaluate.tool_calls import scores
from nemotune.recipe.schema import Source

ROOT = os.environ.get("NEMOTUNE_TEST_DATA")
pytestmark = pytest.mark.skipif(ROOT is None, reason="NEMOTUNE_TEST_DATA names no folder of published rows")
DATA = Path(ROOT or ".") / "data"
TEMPLATES = DATA / "nemotron" / "chat_templates"
NEMOTRON, LLAMA = ("nemotron3", "<|im_end|>"), ("llama3_1", "<|eot_id|>")


def tokenizer(name, eos_token):
    text = gzip.decompress((DATA / "nemotron" / "tokenizer" / f"{name}_tokenizer.RECONSTRUCTED.json.gz").read_bytes()).decode()
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token=eos_token)


def answer(renderer, example, number):
    """What the template makes the assistant say in turn `number`, up to the token that ends it."""
    prompt = renderer.prompt_tokens(example, turn=number)
    tokens = renderer.encode(replace(example, messages=example.messages[: number + 1]))[-1].tokens
    assert tokens[: len(prompt)] == prompt
    return renderer.tokenizer.decode(tokens[len(prompt) : -1], skip_special_tokens=False).removesuffix(TURN_END)


@pytest.mark.parametrize(
    ("which", "template"),
    [(NEMOTRON, "nemotron_3_nano.jinja"), (NEMOTRON, "nemotron_3_ultra.jinja"), (NEMOTRON, "chatml"), (LLAMA, "model"), (LLAMA, "chatml")],
)
def test_every_glaive_turn_is_perfect_against_itself(which, template):
    renderer = Renderer(tokenizer(*which), template=str(TEMPLATES / template) if template.endswith(".jinja") else template)
    rows = iter_rows(Source(path=str(DATA / "glaive" / "raw_format_reconstructed_300.jsonl")))
    num_calls = 0
    for number_of_row, row in enumerate(rows):
        example = FORMATS["glaive"](row)
        for number, message in enumerate(example.messages):
            if message["role"] == "assistant" and example.tools:
                calls = [Call(**call["function"]) for call in message.get("tool_calls", ())]
                got = scores(answer(renderer, example, number), calls=calls, tools=example.tools)
                assert set(got.values()) == {1.0}, (number_of_row, number, got)
                num_calls += len(calls)
    assert num_calls == 211
