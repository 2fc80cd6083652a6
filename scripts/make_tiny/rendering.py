"""Conversations as text, through the template that ships with the model; tokenizer.py needs them before there is a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

ASSETS = Path(__file__).parents[2] / "src" / "nemotune" / "assets"
MODEL_DIR = ASSETS / "nemotron-tiny"


def render(messages: Sequence[dict], tools: Sequence[dict] = ()) -> str:
    """The whole conversation, as `tokenizer.apply_chat_template(..., tokenize=False)` gives it."""
    return _template().render(messages=list(messages), tools=list(tools) or None, add_generation_prompt=False)


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, *, thought: str = "") -> dict:
    return {"role": "assistant", "content": content} | ({"reasoning_content": thought} if thought else {})


@cache
def _template() -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    return environment.from_string((MODEL_DIR / "chat_template.jinja").read_text())
