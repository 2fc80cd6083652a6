"""README and docs describe today: their recipes load, their commands parse, their Python runs, their tables are the code's."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from pages import DOCS, PAGES, README, ROOT, blocks, coded, commands, table_rows

from nemotune.cli import finetune
from nemotune.cli.main import MODULES, VERBS, app
from nemotune.errors import MissingFileError
from nemotune.recipe import Recipe, Source, builtin_names, load
from nemotune.recipe.load import builtin_text
from nemotune.recipe.schema import Section
from nemotune.recipe.support import LIMITS, refused

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@by_page
def test_recipes_in_the_text_load(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text, encoding="utf-8")
        load(str(path))


@by_page
def test_python_in_the_text_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A page is one session: later blocks use the names and files of earlier ones."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for text in blocks(page, "python"):
        exec(compile(text, str(page), "exec"), names)


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
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    local = [(page.parent / link, anchor) for link, anchor in links if "://" not in link]
    assert [target for target, _ in local if not target.exists()] == []
    assert [(target, anchor) for target, anchor in local if anchor and anchor not in anchors(target)] == []


def anchors(page: Path) -> list[str]:
    """The headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_readme_lists_the_pages() -> None:
    linked = [re.search(r"\((.*)\)", page)[1] for page, _ in table_rows(README, "page | what it answers")]  # type: ignore[index]
    assert sorted(linked) == sorted(str(page.relative_to(ROOT)) for page in DOCS.glob("*.md"))


def leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section) and field.annotation is not Source:
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def test_recipe_page_has_every_key_with_its_default() -> None:
    told = [(key.strip("`"), default.strip("`")) for key, default, _ in table_rows(DOCS / "recipe.md", "key | default | what it says")]
    assert told == [(key, "required" if field.is_required() else json.dumps(field.default)) for key, field in leaves(Recipe)]


def test_cli_page_has_every_verb_with_its_options() -> None:
    told = {
        verb.strip("`"): set(options.replace("`", "").split())
        for verb, _, options in table_rows(DOCS / "cli.md", "verb | what it does | options")
    }
    real: dict[str, set[str]] = {}
    for verb in VERBS:
        command: Any = typer.main.get_command(importlib.import_module(f"nemotune.cli.{MODULES.get(verb, verb)}").app)
        inner = {f"{verb} {name}": found for name, found in command.commands.items()} if hasattr(command, "commands") else {verb: command}
        real |= {name: {option for p in found.params for option in p.opts if option.startswith("--")} for name, found in inner.items()}
    assert told == real


def test_cli_page_has_every_option_of_finetune() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    short = {coded(row[0])[0].split()[0] for row in table_rows(DOCS / "cli.md", "`finetune` | is")}
    shared = re.search(r"It also takes (.*) and overrides", text)
    assert shared
    command: Any = typer.main.get_command(finetune.app)
    real = {option for p in command.params for option in p.opts if option.startswith("--")}
    assert short | set(coded(shared[1])) == real


def test_readme_lists_what_is_not_built_yet() -> None:
    rows = [[cell.replace("`", "") for cell in row] for row in table_rows(README, "key | not built yet | instead")]
    assert rows == [[limit.key, limit.what, limit.instead] for limit in LIMITS]


def test_readme_lists_the_recipes_and_what_they_wait_for() -> None:
    rows = [[cell.replace("`", "") for cell in row] for row in table_rows(README, "recipe | what it does | waits for")]
    summaries = [(name, builtin_text(name).partition("\n")[0].removeprefix("# ")) for name in builtin_names()]
    assert rows == [
        [name, text.replace("`", ""), ", ".join(limit.key for limit in refused(load(name))) or "runs today"] for name, text in summaries
    ]


def test_readme_tree_is_the_tree() -> None:
    [tree] = [text for text in blocks(README, "") if text.startswith("src/nemotune/")]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()[1:] if line.startswith("  ")}
    packages = {path.parent.name for path in (ROOT / "src" / "nemotune").glob("*/__init__.py")}
    modules = {path.name for path in (ROOT / "src" / "nemotune").glob("*.py")} - {"__init__.py"}
    assert named == packages | modules
    assert all((ROOT / line.split()[0]).exists() for line in tree.splitlines()[1:] if not line.startswith(" "))
