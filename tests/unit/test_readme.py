"""README and docs describe today: their recipes load, their commands parse, their Python runs, their tables are the code's."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from nemotune.cli import finetune
from nemotune.cli.main import MODULES, VERBS, app
from nemotune.errors import MissingFileError
from nemotune.recipe import Recipe, Source, builtin_names, load
from nemotune.recipe.load import builtin_text
from nemotune.recipe.schema import Section
from nemotune.recipe.support import LIMITS, refused

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def table_rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the table that begins with the row `| heading |`."""
    _, _, rest = page.read_text(encoding="utf-8").partition(f"| {heading} |\n")
    lines = rest.split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def commands(page: Path) -> list[list[str]]:
    lines = [line for text in blocks(page, "sh") for line in text.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] in ("nemotune", "finetune")]


@by_page
def test_recipes_in_the_text_load(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text, encoding="utf-8")
        load(str(path))


@by_page
def test_python_in_the_text_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for text in blocks(page, "python"):
        exec(compile(text, str(page), "exec"), {})


@by_page
def test_commands_in_the_text_exist(page: Path) -> None:
    for program, *words in commands(page):
        group: Any = typer.main.get_command(finetune.app if program == "finetune" else app)
        context = group.make_context(program, words)
        while hasattr(group, "resolve_command"):
            name, group, words = group.resolve_command(context, words)
            context = group.make_context(name, words, parent=context)
        overrides = context.params.get("overrides") or ()
        recipe = context.params.get("recipe", "glaive-nano-4b" if program == "finetune" else "quickstart")
        try:
            load(recipe, overrides)
        except MissingFileError:  # a recipe of the reader's: its overrides have to fit any recipe
            load("quickstart", overrides)


@by_page
def test_links_and_paths_in_the_text_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section) and field.annotation is not Source:
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def test_recipe_page_has_every_key_with_its_default() -> None:
    told = [
        (key.strip("`"), default.strip("`")) for key, default, _ in table_rows(ROOT / "docs" / "recipe.md", "key | default | what it says")
    ]
    assert told == [(key, "required" if field.is_required() else json.dumps(field.default)) for key, field in leaves(Recipe)]


def test_cli_page_has_every_verb_with_its_options() -> None:
    told = {
        verb.strip("`"): set(options.replace("`", "").split())
        for verb, _, options in table_rows(ROOT / "docs" / "cli.md", "verb | what it does | options")
    }
    real: dict[str, set[str]] = {}
    for verb in VERBS:
        command: Any = typer.main.get_command(importlib.import_module(f"nemotune.cli.{MODULES.get(verb, verb)}").app)
        inner = {f"{verb} {name}": found for name, found in command.commands.items()} if hasattr(command, "commands") else {verb: command}
        real |= {name: {option for p in found.params for option in p.opts if option.startswith("--")} for name, found in inner.items()}
    assert told == real


def test_readme_lists_what_is_not_built_yet() -> None:
    rows = [[cell.replace("`", "") for cell in row] for row in table_rows(ROOT / "README.md", "key | not built yet | instead")]
    assert rows == [[limit.key, limit.what, limit.instead] for limit in LIMITS]


def test_readme_lists_the_recipes_and_what_they_wait_for() -> None:
    rows = [[cell.replace("`", "") for cell in row] for row in table_rows(ROOT / "README.md", "recipe | what it does | waits for")]
    summaries = [(name, builtin_text(name).partition("\n")[0].removeprefix("# ")) for name in builtin_names()]
    assert rows == [
        [name, text.replace("`", ""), ", ".join(limit.key for limit in refused(load(name))) or "runs today"] for name, text in summaries
    ]


def test_readme_tree_is_the_tree() -> None:
    [tree] = [text for text in blocks(ROOT / "README.md", "") if text.startswith("src/nemotune/")]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()[1:] if line.startswith("  ")}
    packages = {path.parent.name for path in (ROOT / "src" / "nemotune").glob("*/__init__.py")}
    modules = {path.name for path in (ROOT / "src" / "nemotune").glob("*.py")} - {"__init__.py"}
    assert named == packages | modules
    assert all((ROOT / line.split()[0]).exists() for line in tree.splitlines()[1:] if not line.startswith(" "))
