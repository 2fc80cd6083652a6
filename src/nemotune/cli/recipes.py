"""`nemotune recipes`: the built-in recipes, a recipe with everything filled in, and the JSON Schema for editors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotune.cli.options import Overrides, Overwrite, RecipeName

app = typer.Typer(add_completion=False, no_args_is_help=True, help="List the recipes, show one, or print their schema.")


@app.command("list")
def list_recipes() -> None:
    """List the built-in recipes, and what each still waits for."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from nemotune import recipe as recipes
    from nemotune.recipe.load import builtin_text
    from nemotune.recipe.support import refused

    table = Table("recipe", "what it does", "waits for", box=box.SIMPLE, pad_edge=False)
    for name in recipes.builtin_names():
        summary = builtin_text(name).partition("\n")[0].removeprefix("# ")
        waits = ", ".join(limit.key for limit in refused(recipes.load(name)))
        table.add_row(f"[bold]{name}[/]", summary, waits or "[green]runs today[/]")
    Console().print(table)
    typer.echo("Next: nemotune recipes show quickstart")


@app.command()
def show(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="As JSON with every default filled in, overrides applied.")] = False,
) -> None:
    """Print a recipe: as it is written, or resolved."""
    import json

    from nemotune import recipe as recipes
    from nemotune.recipe.load import builtin_text

    loaded = recipes.load(recipe, overrides or ())
    if resolved or overrides or recipe not in recipes.builtin_names():
        typer.echo(json.dumps(recipes.dump(loaded), indent=2))
    else:
        typer.echo(builtin_text(recipe), nl=False)


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("--output", help="A file to write; printed otherwise.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the JSON Schema of a recipe, for editors."""
    import json

    from nemotune import recipe as recipes
    from nemotune.errors import ConflictError
    from nemotune.files import atomic_file

    text = json.dumps(recipes.json_schema(), indent=2) + "\n"
    if output is None:
        typer.echo(text, nl=False)
        return
    if output.exists() and not overwrite:
        raise ConflictError(f"--output: {output} exists, expected a new file; --overwrite replaces it")
    with atomic_file(output) as aside:
        aside.write_text(text, encoding="utf-8")
    typer.echo(f"Wrote {output}. Next: begin a recipe with  # yaml-language-server: $schema={output}")
