"""`nemotune doctor`: the machine and the installed packages, as a run will find them."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="As JSON, to paste into a bug report.")] = False) -> None:
    """Show the machine and packages, and what is missing."""
    import json

    from nemotune.plan import environment

    found = environment.describe()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for name, value in environment.rows(found):
        table.add_row(f"[bold]{name}[/]", value)
    console = Console()
    console.print(table)
    for note in environment.notes(found):
        console.print(f"[yellow]note[/] {note}", soft_wrap=True)
    console.print("Next: nemotune run quickstart")
