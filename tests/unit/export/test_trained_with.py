"""What the adapter was trained to talk with goes with the merged model; where the adapter has none, the base's does."""

from __future__ import annotations

import pytest
from random_models import make

from nemotune.export.merge import merge
from nemotune.lora import apply_lora, save_adapter
from nemotune.models import load_model
from nemotune.recipe import Lora

CONVERSATION = {"chat_template.jinja": "{{ messages }} of the ", "generation_config.json": '{"eos_token_id": [2, 11], "of": "the '}


@pytest.mark.parametrize("theirs", [(), ("chat_template.jinja",), tuple(CONVERSATION)])
def test_template_and_stop_tokens_of_the_merged_model_are_the_adapters(theirs, tmp_path):
    make("llama").save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", dtype="float32")
    apply_lora(model, Lora(rank=2))
    save_adapter(model, tmp_path / "adapter", Lora(rank=2), base="base")
    for name, text in CONVERSATION.items():
        (tmp_path / "base" / name).write_text(text + 'base"}')
        if name in theirs:
            (tmp_path / "adapter" / name).write_text(text + 'adapter"}')
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    for name, text in CONVERSATION.items():
        whose = "adapter" if name in theirs else "base"
        assert (tmp_path / "merged" / name).read_text() == text + whose + '"}'
