"""`nemotune launch`: a training on several machines as a file for their scheduler, which starts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from nemotune.cli.options import DryRun, Overrides, Overwrite, RecipeName, Resume, RunDir, open_recipe

if TYPE_CHECKING:
    from nemotune.workflow.cluster import Job

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Write a job for several machines: Slurm, SkyPilot.")
Nodes = Annotated[int, typer.Option("--nodes", min=1, help="Machines; parallel.nproc is divided among them.")]
Output = Annotated[Path | None, typer.Option("--output", help="The file to write; named after the recipe otherwise.")]


@app.command()
def slurm(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    nodes: Nodes = 1,
    time: Annotated[
        str, typer.Option("--time", help="The job's time limit, as sbatch takes it; it is queued again until it has trained.")
    ] = "24:00:00",
    run_dir: RunDir = None,
    resume: Resume = False,
    output: Output = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Write a script for sbatch."""
    from nemotune.workflow.cluster import slurm_script

    job = _job(recipe, overrides, run_dir, nodes, resume)
    _write(lambda: slurm_script(job, time=time), output or Path(f"{job.recipe.name}.sbatch"), overwrite, dry_run, then="sbatch")


@app.command()
def skypilot(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpu: Annotated[str, typer.Option("--gpu", help="The GPUs, as SkyPilot names them.")] = "H100",
    run_dir: RunDir = None,
    resume: Resume = False,
    output: Output = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Write a task for SkyPilot."""
    from nemotune.workflow.cluster import skypilot_task

    job = _job(recipe, overrides, run_dir, nodes, resume)
    _write(lambda: skypilot_task(job, gpu=gpu), output or Path(f"{job.recipe.name}.sky.yaml"), overwrite, dry_run, then="sky jobs launch")


def _job(recipe: str, overrides: list[str] | None, run_dir: Path | None, nodes: int, resume: bool) -> Job:
    from nemotune.workflow.cluster import Job

    opened = open_recipe(recipe, overrides, run_dir, verb="train")
    return Job(opened.recipe, [recipe, *(overrides or ())], opened.run_dir, nodes, resume)


def _write(text: Callable[[], str], path: Path, overwrite: bool, dry_run: bool, *, then: str) -> None:
    from nemotune.errors import ConflictError
    from nemotune.files import atomic_file

    if dry_run:
        typer.echo(text(), nl=False)
        return
    if path.exists() and not overwrite:
        raise ConflictError(f"--output: {path} exists, expected a new file; --overwrite replaces it")
    written = text()
    with atomic_file(path) as aside:
        aside.write_text(written, encoding="utf-8")
    typer.echo(f"Wrote {path}. Next: {then} {quote(str(path))}")
