"""`nemotune`: finds the verb that was typed, and turns an error into a block that can be read.

A verb's module is imported when it is named (`--help` asks each for its first line), and imports torch only inside its function:
`nemotune --help` loads neither torch nor transformers nor pydantic. Where to read next: `run.py`.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nemotune.errors import AFTER_SIGNAL, NemotuneError, did_you_mean
from nemotune.workflow import processes

__all__ = ["guarded", "main"]

VERBS = (
    "run", "data", "data index", "plan", "train", "launch", "eval", "merge", "export gguf", "export adapter", "export hub",
    "export ollama", "convert adapter", "convert import", "convert export", "convert inspect", "report", "recipes", "doctor",
)  # fmt: skip
MODULES = {  # where the verb's name is none for a module
    "eval": "evaluate", "data index": "index", "export gguf": "export_gguf", "export adapter": "export_adapter", "export hub": "export_hub",
    "export ollama": "export_ollama", "convert adapter": "convert_adapter", "convert import": "convert_import", "convert export": "convert_export",
    "convert inspect": "convert_inspect",
}  # fmt: skip


class Verbs(TyperGroup):
    """The verbs by name, each from the module of its name."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        command = typer.main.get_command(importlib.import_module(f"nemotune.cli.{MODULES.get(cmd_name, cmd_name)}").app)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if (two := " ".join(args[:2])) in VERBS:  # `data index`, where `data` takes a recipe
            return super().resolve_command(ctx, [two, *args[2:]])
        verb = args[0]
        if verb not in VERBS and not verb.startswith("-"):
            if verb == "finetune":
                ctx.fail("finetune is a command of its own: type it without nemotune, as `finetune --help`.")
            if longer := [name for name in VERBS if name.startswith(f"{verb} ")]:
                ctx.fail(f"{verb} takes one more word: {', '.join(longer)}.")
            ctx.fail(f"no verb '{verb}'.{did_you_mean(verb, VERBS)} `nemotune --help` lists them.")
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        from nemotune import __version__

        typer.echo(f"nemotune {__version__}")
        raise typer.Exit


@app.callback(epilog="Start with: nemotune run quickstart")
def _nemotune(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from; goes anywhere on the line.")] = False,
) -> None:
    """Tune NVIDIA Nemotron models on your own rows: one recipe from data to an evaluated, merged model."""


def guarded(application: typer.Typer) -> None:
    """Run the application on the command line and exit: with 2 and a readable block where the user can mend it, with 130 when interrupted.

    Of several processes the first that fails tells why; where that is the user's to mend, those that torchrun starts again end at once.
    """
    _spin_briefly()
    if processes.has_failed_for_good():
        sys.exit(2)
    debug, words = "--debug" in sys.argv, [word for word in sys.argv[1:] if word != "--debug"]
    try:
        application(words)
    except (NemotuneError, OSError) as error:
        tells = processes.first_to_fail(processes.USERS)
        if debug:
            traceback.print_exc()
        elif tells:
            _print_error(_words_of(error))
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130 and not processes.are_several():
            typer.echo(f"Interrupted. {_goes_on(words)}", err=True)
        raise
    except Exception as error:
        if processes.are_several() and not debug:
            if AFTER_SIGNAL in getattr(error, "__notes__", ()):
                if processes.first_to_fail("1"):
                    typer.echo(f"{type(error).__name__} {AFTER_SIGNAL}, as where another process is lost; --debug shows it.", err=True)
                sys.exit(1)
            if not processes.first_to_fail_after_the_cause():
                sys.exit(1)
        raise


def _goes_on(words: list[str]) -> str:
    """What to type after an interrupt: an export is continued by what began it."""
    if words[:1] in (["merge"], ["export"], ["convert"]):
        return "What is done is kept: the same command goes on from there."
    return "The same command with --resume goes on from the last checkpoint of a training run."


def _spin_briefly() -> None:
    """Before torch is loaded: let OpenMP's threads wait for one another by spinning for microseconds, where GNU's default is milliseconds.

    Quickstart on two cores, seconds a step: 0.27 either way; beside another busy process 0.7 against 2.8. (OMP_WAIT_POLICY=PASSIVE: 0.34 and 0.4.)
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def _words_of(error: NemotuneError | OSError) -> str:
    """What to print: our own words, or the system's about the file that it named."""
    if isinstance(error, NemotuneError):
        return str(error)
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}; check the path and who may use it" if error.filename else f"{reason}; --debug shows where"


def _print_error(message: str) -> None:
    """The message on stderr, a line per problem, its key in bold."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text("Error", style="bold red"))
    for line in message.splitlines():
        text = Text(f"  {line}")
        text.highlight_regex(r"^  [\w.\[\]/-]+(?=:)", "bold")
        console.print(text)


def main() -> None:
    """The console script `nemotune`."""
    guarded(app)


if __name__ == "__main__":
    main()
