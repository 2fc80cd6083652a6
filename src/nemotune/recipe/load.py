"""A recipe from YAML and overrides: the name of a built-in one, a file, or a run directory; then `section.field=value`.

Nothing is read but that text; no data, no model, no torch. Everything that does not fit is collected and raised once.
Defaults are in `schema.py`, wording in `explain.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nemotune.errors import MissingFileError, RecipeError, did_you_mean
from nemotune.recipe import explain, text
from nemotune.recipe.schema import Recipe

__all__ = ["builtin_names", "builtin_text", "dump", "json_schema", "load"]

_BUILTIN = resources.files("nemotune.recipe") / "builtin"


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that built-in name, YAML file or run directory, with overrides such as `train.epochs=2` on top.

    An override's value is YAML (`lora.targets=[q_proj, v_proj]`, `train.max_steps=null`); for a field that is text it is taken as typed.
    Raises RecipeError with one line per problem, MissingFileError where no such file is.
    """
    tree = _read(name_or_path)
    if not isinstance(tree, dict):
        raise RecipeError(f"{name_or_path}: got {type(tree).__name__}, expected a mapping with name, model, data, ...")
    malformed = []
    for override in overrides:
        try:
            _apply(tree, override)
        except RecipeError as error:
            malformed.append(str(error))
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(malformed + explain.problems(error))) from error
    if malformed:
        raise RecipeError("\n".join(malformed))
    return recipe


def dump(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default filled in, as JSON-able values; `load` of it written to a file gives the recipe back."""
    return recipe.model_dump(mode="json")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, for editors."""
    return explain.json_schema()


def builtin_names() -> list[str]:
    """The recipes that ship, quickstart first."""
    names = sorted(entry.name.removesuffix(".yaml") for entry in _BUILTIN.iterdir() if entry.name.endswith(".yaml"))
    return sorted(names, key=lambda name: name != "quickstart")


def builtin_text(name: str) -> str:
    """The YAML of a built-in recipe as written, comments and all."""
    if name not in builtin_names():
        raise RecipeError(_unknown(name))
    return (_BUILTIN / f"{name}.yaml").read_text(encoding="utf-8")


def _read(name_or_path: str) -> Any:
    path = Path(name_or_path)
    if name_or_path in builtin_names():
        return text.parse(builtin_text(name_or_path), origin=f"recipe {name_or_path}")
    if path.is_dir():
        return _read_run(path)
    if path.is_file():
        return text.parse(_decoded(path), origin=name_or_path)
    if "=" not in name_or_path and (path.suffix in (".yaml", ".yml", ".json") or len(path.parts) > 1):
        raise MissingFileError(f"recipe: no file '{name_or_path}' here ({Path.cwd()}); `nemotune recipes list` names the built-in ones")
    raise RecipeError(_unknown(name_or_path))


def _read_run(run_dir: Path) -> Any:
    """The resolved recipe that a run left in its directory, beside versions and fingerprints."""
    path = run_dir / "recipe.json"
    if not path.is_file():
        raise MissingFileError(f"recipe: '{run_dir}' has no recipe.json, expected a recipe's name, its YAML file or a run directory")
    tree = text.parse(_decoded(path), origin=str(path))
    if not isinstance(tree, dict) or "recipe" not in tree:
        raise RecipeError(f"{path}: got no key 'recipe', expected a file that a run wrote")
    return tree["recipe"]


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not text in UTF-8 (byte {error.start}), expected a YAML file") from error


def _unknown(name: str) -> str:
    names = builtin_names()
    if "=" in name:
        return f"recipe: got the override '{name}', expected a recipe before it, such as: quickstart {name}"
    hint = did_you_mean(name, names) or f" Built in: {', '.join(names)}."
    return f"recipe: no built-in recipe '{name}'.{hint} A path to a YAML file works too."


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `section.field=value` in the tree. Raises RecipeError where the override has another form."""
    dotted, equals, typed = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override '{override}': expected section.field=value, such as train.epochs=2")
    here = tree
    for key in keys[:-1]:
        inner = here.get(key)
        if not isinstance(inner, dict):  # `train: rows.jsonl` is short for `train: {path: rows.jsonl}`
            here[key] = inner = {"path": inner} if isinstance(inner, str) else {}
        here = inner
    here[keys[-1]] = _value(keys, typed)


def _value(keys: list[str], typed: str) -> Any:
    """The override's value as YAML, but as typed where the field is text: a revision `1234567` is not a number."""
    value = text.parse(typed, origin=f"override '{'.'.join(keys)}={typed}'")
    kinds = {option["type"] for option in explain.options_at(keys)}
    is_text = "string" in kinds and not kinds & {"integer", "number", "boolean", "array"}
    return typed if is_text and value is not None and not isinstance(value, str | dict) else value
