"""What is not built is refused before anything is spent, all of it at once; and no field of the recipe is read by nobody."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nemotune.recipe
from nemotune.errors import UnsupportedError
from nemotune.recipe import Recipe, Source, builtin_names, load
from nemotune.recipe import schema as schema_module
from nemotune.recipe.schema import Section
from nemotune.recipe.support import LIMITS, Limit, check, refused

SOURCE = Path(nemotune.recipe.__file__).parent.parent

ASKED = {
    "train.compile": ["train.compile=true"],
    "engine.name": ["engine.name=trl"],
    "engine.python": ["engine.python=/usr/bin/python3"],
    "evaluate.tasks": ["evaluate.tasks=[semantic_similarity]"],
    "evaluate.backend": ["evaluate.backend=nemo_evaluator"],
    "export.adapter": ["export.adapter=false"],
    "logging.trackers": ["logging.trackers=[tensorboard, wandb]"],
}


def test_quickstart_is_supported_whole() -> None:
    check(load("quickstart"))


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.key)
def test_each_limit_is_refused_by_key_with_something_to_do(limit: Limit) -> None:
    with pytest.raises(UnsupportedError, match=rf"^{limit.key}: not built yet: .+\. Use .+\.$"):
        check(load("quickstart", ASKED[limit.key]))


def test_all_limits_are_named_at_once() -> None:
    with pytest.raises(UnsupportedError) as caught:
        check(load("quickstart", [override for overrides in ASKED.values() for override in overrides]))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [limit.key for limit in LIMITS]


def test_verbs_refuse_only_what_they_need() -> None:
    recipe = load("glaive-nano-4b", ["evaluate.tasks=[semantic_similarity]", "train.compile=true"])
    assert [limit.key for limit in refused(recipe, verb="run")] == ["train.compile", "evaluate.tasks"]
    assert [limit.key for limit in refused(recipe, verb="train")] == ["train.compile"]
    assert refused(recipe, verb="data") == refused(recipe, verb="report") == []


def test_what_to_use_instead_is_supported() -> None:
    """Every built-in recipe runs once its limits' overrides are applied, so that the advice is not another refusal."""
    for name in builtin_names():
        limits = refused(load(name))
        overrides = [word.rstrip(",.") for limit in limits for word in limit.instead.split() if "=" in word]
        recipe = load(name, [*overrides, "data.train=documents.jsonl"])
        assert refused(recipe) == []


Field = tuple[str, str]  # the class of a section and the name of a field


def sections() -> dict[str, type[Section]]:
    return {found.__name__: found for found in vars(schema_module).values() if isinstance(found, type) and issubclass(found, Section)}


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Every leaf of the recipe as its dotted key and its section and name; a source of rows is a leaf."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section) and inner is not Source:
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", (section.__name__, name)


def last_name(node: ast.AST | None) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def fields_read(tree: ast.AST) -> Iterator[Field]:
    """The fields that the functions of a module read: `X.field` where X is called as a section is (`recipe.train.epochs`), is a parameter
    annotated as one (`settings: Train`), or is a local that was set from one (`settings = recipe.train`)."""
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        kinds = {name.lower(): name for name in sections()}
        parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        kinds |= {
            p.arg: name for p in parameters if p.annotation for node in ast.walk(p.annotation) if (name := last_name(node)) in sections()
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and last_name(node.value) in kinds:
                kinds |= {last_name(target): kinds[last_name(node.value)] for target in node.targets}
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and last_name(node.value).lstrip("_") in kinds:
                yield kinds[last_name(node.value).lstrip("_")], node.attr


def test_every_field_is_read_somewhere_or_refused() -> None:
    """A flag that is parsed and never read is what this finds. It reads source, not behaviour: that a field is read in some function
    outside recipe/ does not show that a run comes by there."""
    files = [path for path in SOURCE.rglob("*.py") if path.parent != SOURCE / "recipe" or path.name == "degrees.py"]
    read = {field for path in files for field in fields_read(ast.parse(path.read_text(encoding="utf-8")))}
    limited = {limit.key for limit in LIMITS}
    unread = [key for key, field in fields(Recipe) if field not in read and limited.isdisjoint({key, key.partition(".")[0]})]
    assert unread == []


def test_a_field_that_nobody_reads_is_found() -> None:
    source = "def f(recipe, t: Train):\n    e = recipe.export\n    return recipe.model.path, t.epochs, e.gguf, other.merged"
    assert set(fields_read(ast.parse(source))) >= {("Model", "path"), ("Train", "epochs"), ("Export", "gguf")}
    assert ("Export", "merged") not in set(fields_read(ast.parse(source)))
