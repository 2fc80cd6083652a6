"""What does not fit in a recipe, in sentences: `train.epochs: got 'three', expected a number above 0`.

What a field expects is worded from the recipe's JSON Schema, so that it cannot differ from `schema.py`. Pydantic reports each branch
of a union by itself; here they become one line per key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from pydantic import ValidationError

from nemotune.errors import did_you_mean
from nemotune.recipe.schema import Recipe

__all__ = ["json_schema", "options_at", "problems"]

Node = dict[str, Any]


@cache
def json_schema() -> Node:
    """The recipe's JSON Schema (draft 2020-12), as editors read it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def problems(error: ValidationError) -> list[str]:
    """One line per key of the recipe that does not fit, in the recipe's order."""
    found: dict[str, str] = {}
    for item in error.errors():
        keys, options = _locate(item["loc"])
        path = ".".join(keys).replace(".[", "[")
        found.setdefault(path, _line(path, item, options))
    # A mapping that was tried as a number as well failed there too: what is wrong inside it says more.
    return [line for path, line in found.items() if not any(other.startswith((f"{path}.", f"{path}[")) for other in found if other != path)]


def options_at(keys: Sequence[str]) -> list[Node]:
    """The schemas that a value at this key may follow (several where it is a union), or none where the recipe has no such key."""
    options = [json_schema()]
    for key in keys:
        options = [found for option in options for found in _resolve(_property(option, key))]
    return options


def _property(option: Node, key: int | str) -> Node | None:
    """The schema of a mapping's value at `key`; a mapping whose keys are free has the same for each."""
    others = option.get("additionalProperties")
    found: Node | None = option.get("properties", {}).get(key, others if isinstance(others, dict) else None)
    return found


def _resolve(node: Node | None) -> Iterator[Node]:
    if node is None:
        return
    if "$ref" in node:
        yield from _resolve(json_schema()["$defs"][node["$ref"].rsplit("/", 1)[-1]])
    elif "anyOf" in node:
        for option in node["anyOf"]:
            yield from _resolve(option)
    else:
        yield node


def _locate(location: tuple[int | str, ...]) -> tuple[list[str], list[Node]]:
    """The keys of a pydantic location without the names of union branches, and what is expected there."""
    keys: list[str] = []
    options = [json_schema()]
    for position, part in enumerate(location):
        inside = [node for option in options if (node := _property(option, part))]
        if isinstance(part, int):
            keys.append(f"[{part}]")
            inside = [
                option.get("prefixItems", [option.get("items")] * (part + 1))[part] for option in options if option["type"] == "array"
            ]
        elif inside or (position == len(location) - 1 and _is_branch(part, options) is False):
            keys.append(part)
        else:
            continue
        options = [found for node in inside for found in _resolve(node)]
    return keys, options


def _is_branch(part: str, options: list[Node]) -> bool:
    """Whether `part` names a branch of a union: a section of the recipe, or a type such as `tuple[str, ...]`."""
    return len(options) > 1 and (part in json_schema()["$defs"] or not part.isidentifier() or part in ("str", "int", "float", "bool"))


def _line(path: str, item: Any, options: list[Node]) -> str:
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown key.{_nearest_key(path)}"
    if item["type"] == "missing":
        return f"{path}: missing, expected {_expected(options)}"
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"])
        return message if any("properties" in option for option in options) else f"{path}: {message}"
    names = [name for option in options for name in option.get("enum", [])]
    hint = did_you_mean(item["input"], names) if isinstance(item["input"], str) else ""
    return f"{path}: got {_spelled(item['input'])}, expected {_expected(options)}{'.' + hint if hint else ''}"


def _nearest_key(path: str) -> str:
    *section, key = path.split(".")
    siblings = [name for option in options_at(section) for name in option.get("properties", {})]
    if hint := did_you_mean(key, siblings):
        return hint
    homes = [name for name in json_schema()["properties"] if options_at((name, key))]
    return f" Did you mean '{homes[0]}.{key}'?" if homes else f" Known here: {', '.join(siblings)}."


def _spelled(value: Any) -> str:
    if isinstance(value, dict):
        return f"a mapping ({', '.join(map(str, value))})" if value else "an empty mapping"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _expected(options: list[Node]) -> str:
    return " or ".join(dict.fromkeys(_worded(option) for option in options))


def _worded(node: Node) -> str:
    if "enum" in node:
        return f"{', '.join(node['enum'][:-1])} or {node['enum'][-1]}"
    if "const" in node:
        return str(node["const"])
    if node["type"] in ("integer", "number"):
        return _number(node)
    if node["type"] == "array":
        return (
            f"a list of {len(node['prefixItems'])}"
            if "prefixItems" in node
            else f"a list [...] of {_expected(list(_resolve(node['items'])))}"
        )
    if node["type"] == "object" and "properties" not in node:
        return f"a mapping of names to {_expected(list(_resolve(node['additionalProperties'])))}"
    if node["type"] == "object":
        return f"a mapping with {', '.join(node['properties'])}"
    if "pattern" in node:
        return f"text that matches {node['pattern']}"
    return {"boolean": "true or false", "string": "text", "null": "null"}[node["type"]]


def _number(node: Node) -> str:
    whole = node["type"] == "integer"
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, below = node.get("maximum"), node.get("exclusiveMaximum")
    if whole and above is not None:
        low, above = above + 1, None
    if low is not None and high is None and below is None:
        bounds = f" of at least {low:g}"
    else:
        start = f" above {above:g}" if above is not None else f" from {low:g}" if low is not None else ""
        bounds = start + (f" to {high:.12g}" if high is not None else f" to below {below:g}" if below is not None else "")
    return ("a whole number" if whole else "a number") + bounds
