"""YAML to plain values, as a recipe wants it: duplicate keys are errors, and 2e-4 is a number.

PyYAML follows YAML 1.1, which reads `5e-2` (no dot) as text, a path where a share is meant, and lets the last of two equal keys win. JSON is YAML too, so the
`recipe.json` of a run directory is read by the same code. What the values have to be is said in `schema.py`.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from nemotune.errors import RecipeError

__all__ = ["parse"]


class _Loader(yaml.SafeLoader):
    """The safe loader with numbers such as 2e-4 and without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key.value}' stands twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789"))


def parse(text: str, *, origin: str) -> Any:
    """The value that `text` spells; `origin` (a file, or an override) is named in errors.

    Raises RecipeError with the line and column of what is not YAML, or of a key that stands twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{origin}{place}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: not readable as YAML: {error}") from error
