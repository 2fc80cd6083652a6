"""What a stage says on the console that it was given."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape


def say(console: Console, text: str) -> None:
    """A line as it is: paths are neither wrapped nor read as markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def size(num_bytes: float) -> str:
    """Bytes as people read them: `991 B`, `1.8 kB`, `2.4 MB`, `7.91 GB`."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"


def wrote(console: Console, path: Path, *, then: str | None) -> None:
    """The line that a stage ends with; `then` is what to type next, where nothing goes on by itself."""
    following = f"   next: [bold]{escape(then)}[/]" if then else ""
    console.print(f"[green]wrote[/] {escape(str(path))}{following}", soft_wrap=True, highlight=False)
