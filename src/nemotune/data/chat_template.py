"""Chat templates: which one a recipe means, and messages rendered to text by it.

The rendering is transformers' own, so that training sees what serving will. Not here: tokens and masks (`turns.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from nemotune.data.example import RowError
from nemotune.errors import DataError, MissingFileError

BUILTIN = {"nemotron3": "<|im_start|>", "llama3": "<|start_header_id|>"}  # for tokenizers without a template, by the token they have
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
ON_A_ROW = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)  # what a row that does not suit its template raises

Messages = tuple[dict[str, Any], ...] | list[dict[str, Any]]


@dataclass(frozen=True)
class Rendering:
    """text; marks: the (start, end) characters inside `{% generation %}` blocks, None where the template has none."""

    text: str
    marks: list[tuple[int, int]] | None


class ChatTemplate:
    """A Jinja chat template. `name` says where it came from, `source` is its text."""

    def __init__(self, source: str, *, name: str, variables: dict[str, str]) -> None:
        self.source, self.name, self.variables = source, name, variables
        self.has_marks = bool(MARKS.search(source))
        self.has_switch = "/no_think" in source  # Nemotron-Nano v2 reads its thinking mode from the system message
        _compile(source, name)

    def render(self, messages: Messages, *, tools: Messages = (), thinking: bool, prompt: bool = False) -> Rendering:
        """The conversation as text, with the generation prompt of `thinking` after it when `prompt`. Raises RowError."""
        try:
            texts, marks = render_jinja_template(
                conversations=[_switched(messages, thinking) if self.has_switch else list(messages)],
                tools=list(tools) or None,
                chat_template=self.source,
                return_assistant_tokens_mask=self.has_marks,
                add_generation_prompt=prompt,
                enable_thinking=thinking,
                chat_template_kwargs={"enable_thinking": thinking},  # the name that NeMo's data templates read it under
                **self.variables,
            )
        except ON_A_ROW as error:
            raise RowError("the template cannot render the row", f"{type(error).__name__}: {error}") from error
        return Rendering(texts[0], marks[0] if self.has_marks else None)


def _switched(messages: Messages, thinking: bool) -> list[dict[str, Any]]:
    switch = "/think" if thinking else "/no_think"
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']} {switch}"}, *messages[1:]]
    return [{"role": "system", "content": switch}, *messages]


def choose_template(tokenizer: PreTrainedTokenizerFast, choice: str) -> ChatTemplate:
    """The template that `data.template` means: `model` (else the built-in that fits), `chatml`, or a Jinja file."""
    variables = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    variables["turn_end"] = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else f"<|im_end|>{tokenizer.eos_token or ''}"
    if choice == "chatml":
        return ChatTemplate(_builtin("chatml"), name="built-in chatml", variables=variables)
    if choice != "model":
        return ChatTemplate(_read(Path(choice).expanduser()), name=choice, variables=variables)
    if tokenizer.chat_template:
        return ChatTemplate(tokenizer.get_chat_template(), name="the tokenizer's own", variables=variables)
    vocabulary = tokenizer.get_vocab()
    fitting = [name for name, token in BUILTIN.items() if token in vocabulary]
    if not fitting:
        raise DataError(
            "data.template: got 'model', but the tokenizer has no chat template and no chat tokens that a built-in one could use; "
            "set data.template to none (raw prompts), chatml or a Jinja file"
        )
    return ChatTemplate(_builtin(fitting[0]), name=f"built-in {fitting[0]} (the tokenizer has none)", variables=variables)


def _builtin(name: str) -> str:
    return (files(__package__) / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def _read(path: Path) -> str:
    if not path.is_file():
        raise MissingFileError(f"data.template: got '{path}', expected model, none, chatml or the path of a Jinja file that exists")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data.template: {path} is not UTF-8 text (byte {error.start}), expected a Jinja file") from error


def _compile(source: str, name: str) -> None:
    """Raise DataError with the line when the template is not valid Jinja, before any row is blamed."""
    try:
        render_jinja_template(conversations=[[{"role": "user", "content": "probe"}]], chat_template=source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"data.template: {name}, line {error.lineno}: {error.message}; mend the template") from error
    except ON_A_ROW:
        return  # it compiled; whether it renders is each row's question
