"""`Example`: one usable row in processed form, and `RowError`: why a row is not one.

Formats make Examples, the template turns them into tokens, evaluators read their `meta`. Not here: what raw rows look
like (`formats/`) or how messages are rendered (`template.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any


class RowError(Exception):
    """A row that cannot be used. `reason` is short and stable, because rows are counted by it; `detail` is this row's own."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both in args, so that the error survives the way back from another process
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True)
class Example:
    """A conversation, a raw prompt with its completion, or both forms of the same row.

    messages: OpenAI style: role (system, user, assistant, tool), content, and on assistant turns optionally reasoning_content and
    tool_calls [{"type": "function", "function": {"name": str, "arguments": dict}}]. tools: [{"type": "function", "function": {...}}].
    prompt, completion: the raw form; the prompt ends without a space ("Answer:") and the completion begins with it (" B").
    meta: "row" (0-based number in its source) and what evaluators need, such as "answer", "answers", "options", "subject".
    """

    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    prompt: str = ""
    completion: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def answered(self, text: str) -> Example:
        """The same question with another final answer, in both forms: what a multiple-choice evaluator scores."""
        messages = (*self.messages[:-1], {"role": "assistant", "content": text}) if self.messages else ()
        return replace(self, messages=messages, completion=f" {text}" if self.completion.startswith(" ") else text)

    def content(self) -> str:
        """Everything but meta, spelled one way: equal for identical rows, whatever their number."""
        return json.dumps([self.messages, self.tools, self.prompt, self.completion], sort_keys=True, ensure_ascii=False)

    def to_json(self) -> str:
        """One line of JSON that holds only the fields that are set."""
        fields = {name: value for name, value in vars(self).items() if value}
        return json.dumps(fields, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Example:
        """The Example that `to_json` wrote."""
        fields = json.loads(line)
        return cls(**{**fields, "messages": tuple(fields.get("messages", ())), "tools": tuple(fields.get("tools", ()))})


def conversation(*turns: tuple[str, str]) -> tuple[dict[str, Any], ...]:
    """Messages from (role, content) pairs."""
    return tuple({"role": role, "content": content} for role, content in turns)


def text_of(row: dict[str, Any], *keys: str, reason: str) -> str:
    """The first of `keys` that holds text, stripped. Raises RowError(reason) when none does."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            return value.strip()
    raise RowError(reason, f"looked for {_listed(keys)}, the row has {_listed(list(row))}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"
