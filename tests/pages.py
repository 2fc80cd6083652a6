"""README and docs as the tests read them: code blocks, tables, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]


def blocks(page: Path, *languages: str, after: str = "") -> list[str]:
    """The code blocks of these languages, those behind the text `after`."""
    _, found, rest = page.read_text(encoding="utf-8").partition(after) if after else ("", "", page.read_text(encoding="utf-8"))
    assert not after or found, f"{page.name} lacks {after!r}"
    every = re.findall(r"^```(\w*)\n(.*?)^```$", rest, flags=re.MULTILINE | re.DOTALL)
    return [text for language, text in every if language in languages]


def table_rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the table that begins with the row `| heading |`."""
    _, found, rest = page.read_text(encoding="utf-8").partition(f"| {heading} |\n")
    assert found, f"{page.name} has no table headed {heading!r}"
    lines = rest.split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def coded(cell: str) -> list[str]:
    """What stands between backquotes in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def commands(page: Path) -> list[list[str]]:
    """The words of every nemotune and finetune command."""
    lines = [line for text in blocks(page, "sh") for line in text.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True)) and words[0] in ("nemotune", "finetune")]
