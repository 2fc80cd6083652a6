"""`run`, which does the stages in order: data, plan, train, eval, merge, gguf, report; and each stage by the name that a verb calls it by.

Stages meet through files in the run directory, so each runs alone and any one can be done again.
"""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from rich.console import Console
from rich.markup import escape

from nemotune.data.sources import require_sources
from nemotune.engines import native
from nemotune.evaluate import check_recipe, check_rows
from nemotune.models import load_tokenizer
from nemotune.recipe import Recipe
from nemotune.train import Deadline
from nemotune.workflow.exporting import gguf
from nemotune.workflow.merging import merge
from nemotune.workflow.messages import say, wrote
from nemotune.workflow.preparing import data, prepare_rows
from nemotune.workflow.ranks import train
from nemotune.workflow.run_dir import refuse_begun
from nemotune.workflow.scoring import evaluate, score
from nemotune.workflow.stopping import Stoppable
from nemotune.workflow.training import plan, require_fit, train_prepared

__all__ = ["data", "evaluate", "gguf", "merge", "plan", "report", "run", "score", "train", "what_run_writes"]


def run(
    recipe: Recipe, *, run_dir: Path, resume: bool, overwrite: bool, dry_run: bool, console: Console, started: float | None = None
) -> None:
    """The whole run. With `dry_run`, the plan and the list of what would be written. Its deadline counts from `started`, or from now."""
    check_recipe(recipe)
    refuse_begun(run_dir, resume=resume, overwrite=overwrite)
    if dry_run:
        require_sources(recipe)
        plan(recipe, console=console)
        say(console, f"would write {what_run_writes(recipe, run_dir)}")
        return
    deadline = Stoppable.of_run(recipe, run_dir, started=started)
    console.rule(escape(f"{recipe.name} in {run_dir}"), align="left")
    require_fit(recipe)
    prepared = prepare_rows(recipe, run_dir, show=0, overwrite=overwrite, console=console, alone=False)
    if recipe.evaluate.tasks:
        check_rows(recipe, prepared, load_tokenizer(recipe.model.path, recipe.model.revision))
    plan(recipe, console=console)
    train_prepared(recipe, prepared, run_dir, resume=resume, overwrite=overwrite, deadline=deadline, console=console, alone=False)
    if recipe.evaluate.tasks and _is_in_time(deadline, f"nemotune eval {quote(str(run_dir))}", console=console):
        evaluate(recipe, run_dir=run_dir, overwrite=True, dry_run=False, console=console, alone=False)
    if _is_merged(recipe) and _is_in_time(deadline, f"nemotune merge {quote(str(run_dir))}", console=console):
        merge(recipe, run_dir=run_dir, output=None, overwrite=True, dry_run=False, console=console, alone=False)
    if recipe.export.gguf and _is_in_time(deadline, f"nemotune export gguf {quote(str(run_dir))}", console=console):
        gguf(recipe, run_dir=run_dir, output=None, overwrite=True, dry_run=False, console=console, alone=False)
    report(run_dir, console=console)


def what_run_writes(recipe: Recipe, run_dir: Path) -> str:
    """The run's directory, and what will be in it."""
    exports = ["export/merged"] * _is_merged(recipe) + [f"export/{recipe.name}-{kind}.gguf" for kind in recipe.export.gguf]
    later = ["eval"] * bool(recipe.evaluate.tasks) + exports + ["report.html"]
    return f"{run_dir}/: data, metrics.jsonl, checkpoints, {', '.join([native.trained_name(recipe), *later])}"


def _is_merged(recipe: Recipe) -> bool:
    return recipe.export.merged and recipe.method == "lora"


def report(run_dir: Path, *, console: Console) -> None:
    """Write report.html from what the run left."""
    from nemotune.evaluate.report import write_report

    write_report(run_dir)
    wrote(console, run_dir / "report.html", then="open it in a browser")


def _is_in_time(deadline: Deadline, command: str, *, console: Console) -> bool:
    """Whether a stage may still begin; where the deadline has come, says what does it later."""
    if deadline.has_come():
        say(console, f"left out, since train.deadline has come: `{command}` does it")
    return not deadline.has_come()
