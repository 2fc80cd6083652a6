"""A training on several machines as a file for their scheduler: a script for Slurm's sbatch, a task for SkyPilot. Starts nothing itself.

Both start torchrun on each machine and `nemotune train` in each of its processes, and go on from the last checkpoint when they are started again.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nemotune import __version__
from nemotune.errors import RecipeError
from nemotune.plan.parallel import check_parallel
from nemotune.recipe import Recipe
from nemotune.workflow.launching import MAX_RESTARTS

__all__ = ["Job", "skypilot_task", "slurm_script"]

LEAD_SECONDS = 300  # before a job's time limit, for the step under way and a checkpoint


@dataclass(frozen=True)
class Job:
    """The training of `recipe` on `nodes` machines; `words` are the recipe and its settings as typed, `run_dir` is on a disk that they share."""

    recipe: Recipe
    words: Sequence[str]
    run_dir: Path
    nodes: int = 1
    resume: bool = False

    def __post_init__(self) -> None:
        nproc = self.recipe.parallel.nproc
        if nproc % self.nodes:
            fitting = ", ".join(str(nodes) for nodes in range(1, nproc + 1) if nproc % nodes == 0)
            raise RecipeError(
                f"--nodes: got {self.nodes}, expected a divisor of parallel.nproc ({nproc}), the processes of all together: {fitting}"
            )
        check_parallel(self.recipe)

    @property
    def per_node(self) -> int:
        return self.recipe.parallel.nproc // self.nodes

    def values(self) -> dict[str, Any]:
        """What both files say of it, quoted for a shell."""
        return {
            "title": f"nemotune train {self.recipe.name}",
            "name": self.recipe.name,
            "nodes": self.nodes,
            "per_node": self.per_node,
            "max_restarts": MAX_RESTARTS,
            "run_dir": shlex.quote(str(self.run_dir)),
            "train": shlex.join(["train", *self.words, *["--resume"] * self.resume]),
        }


def slurm_script(job: Job, *, time: str) -> str:
    """A batch script that is to be given to sbatch where its directory is the same on all nodes."""
    directory, python = shlex.quote(str(Path.cwd())), shlex.quote(sys.executable)
    return _filled("slurm.sh.jinja", **job.values(), directory=directory, python=python, time=time, lead_seconds=LEAD_SECONDS)


def skypilot_task(job: Job, *, gpu: str) -> str:
    """A task in YAML for `sky jobs launch`. Raises RecipeError where the run directory would be lost with a machine."""
    if not job.run_dir.is_absolute():
        raise RecipeError(
            f"--run-dir: got {job.run_dir}, expected a directory on storage that all machines mount and that outlives them, "
            f"such as --run-dir /storage/{job.recipe.name}; add that mount to the file that is written"
        )
    task = {
        "name": job.recipe.name,
        "num_nodes": job.nodes,
        "resources": {"accelerators": f"{gpu}:{job.per_node}"},
        "workdir": ".",
        "setup": f"python -m pip install nemotune=={__version__}\n",
        "run": _filled("skypilot.sh.jinja", **job.values()),
    }
    heading = f"# {job.recipe.name}: mount what keeps {job.run_dir}, under `volumes` or `file_mounts`; `setup` may install a wheel in workdir instead.\n"
    return heading + yaml.dump(task, Dumper=_Readable, sort_keys=False, width=200)


def _filled(template: str, /, **values: Any) -> str:
    from jinja2 import Environment, StrictUndefined

    text = (resources.files("nemotune.workflow") / template).read_text(encoding="utf-8")
    return Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False).from_string(text).render(values)


class _Readable(yaml.SafeDumper):
    """Several lines as several lines."""


_Readable.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
)
