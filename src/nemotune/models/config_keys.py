"""config.json by key: aliases, what is missing and what is no such number, each named. What the keys mean is in `config_json.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotune.errors import CheckpointError


class ConfigKeys:
    """config.json with aliases: the first of several names that is there and not null; a missing one is named in the error."""

    def __init__(self, raw: Mapping[str, Any], path: Path):
        self.raw, self.path = raw, path

    def __call__(self, *names: str, default: Any = ...) -> Any:
        for name in names:
            if self.raw.get(name) is not None:
                return _plain(self.raw[name])
        if default is ...:
            raise CheckpointError(f"{self.path}: no '{names[0]}'; this model cannot be built without it")
        return default

    def count(self, *names: str, default: Any = ...) -> int:
        """A number of things, or a size: whole, and at least 1."""
        got = self(*names, default=default)
        if type(got) is not int or got < 1:
            raise self.unfit(names[0], got, "a whole number from 1 on")
        return got

    def require_multiple(self, name: str, got: int, of: str, unit: int) -> None:
        if got % unit:
            raise self.unfit(name, got, f"a multiple of {of}, {unit}")

    def unfit(self, name: str, got: Any, expected: str) -> CheckpointError:
        """The error about a value."""
        return CheckpointError(f"{self.path}: {name}: got {got!r}, expected {expected}; correct config.json, or copy it again")

    def require(self, name: str, expected: str, *, default: str) -> None:
        if (got := self(name, default=default)) != expected:
            raise CheckpointError(f"{self.path}: {name}: got '{got}', expected '{expected}'; other variants are not supported")


def _plain(value: Any) -> Any:
    """JSON as transformers 5 writes it, with `{"__float__": "Infinity"}` for what JSON cannot hold."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
