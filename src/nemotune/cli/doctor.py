"""`nemotune doctor`: the machine and the installed packages, as a run will find them; and a model directory, if one is named."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nemotune.plan.model_directory import Check

app = typer.Typer(add_completion=False)
COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


@app.command()
def doctor(
    model_dir: Annotated[str | None, typer.Argument(metavar="MODEL_DIR", help="A model directory to check as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, to paste into a bug report.")] = False,
    repair: Annotated[
        Path | None, typer.Option("--repair", metavar="OUT", help="Write the model to OUT, rows near zero set to the mean of the others.")
    ] = None,
) -> None:
    """Show machine and packages, and what is missing; check a model."""
    if repair is not None:
        _repair(model_dir, repair)
        return
    import json

    from nemotune.plan import environment
    from nemotune.plan.model_directory import check_model

    checks = check_model(model_dir) if model_dir is not None else []
    found = environment.describe()
    if as_json:
        typer.echo(json.dumps(found | ({"model": [asdict(check) for check in checks]} if model_dir else {}), indent=2))
    else:
        _print(found, checks, model_dir)
    if _errors(checks):
        raise typer.Exit(2)


def _repair(model_dir: str | None, target: Path) -> None:
    from nemotune.data.progress import progress
    from nemotune.errors import ConflictError, RecipeError
    from nemotune.export import untrained_rows
    from nemotune.plan.model_directory import model_directory

    if model_dir is None:
        raise RecipeError("--repair: needs a model to repair: nemotune doctor MODEL_DIR --repair OUT")
    if target.exists():
        raise ConflictError(f"--repair: {target} already exists; name a directory that does not")
    with progress("reading embeddings") as advance:
        found = untrained_rows.repair(model_directory(model_dir), target, done=advance)
    if not found:
        typer.echo(f"no row of embeddings or head is near zero; nothing was written. Next: nemotune doctor {model_dir}")
        return
    for kind, table in found.items():
        typer.echo(
            f"{kind}: {len(table.near_zero):,} rows near zero are now the mean of the other {len(table.rms_V) - len(table.near_zero):,}"
        )
    typer.echo("Tokens of such rows now begin alike: train the embeddings too, with lora.targets=[..., embeddings] or method: full")
    typer.echo(f"wrote {target}. Next: nemotune doctor {target}")


def _errors(checks: list[Check]) -> list[Check]:
    return [check for check in checks if check.status == "error"]


def _print(found: dict[str, Any], checks: list[Check], model_dir: str | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    from nemotune.plan import environment

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for name, value in environment.rows(found):
        table.add_row(f"[bold]{name}[/]", escape(value))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    for note in environment.notes(found):
        console.print(f"[yellow]note[/] {escape(note)}")
    for check in checks:
        status = Text(f"{check.status:<8} ", COLOURS[check.status])
        console.print(status.append(f"{check.name:<12} ", "bold").append(check.message.replace("\n", "\n" + 22 * " "), "default"))
    if _errors(checks):
        console.print(f"Next: mend what is marked error, then nemotune doctor {model_dir}", markup=False)
    else:
        console.print(
            f"Next: nemotune plan quickstart model.path={model_dir}" if model_dir else "Next: nemotune run quickstart", markup=False
        )
