"""The run directory's identity: recipe.json says what the run is, and a resumed run has to be the same one."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemotune.errors import ConflictError, DataError
from nemotune.files import read_json, write_json
from nemotune.plan import environment
from nemotune.recipe import Recipe, dump

MAY_CHANGE = (  # what a resumed run may have otherwise: how long it goes on, what it writes, and what changes rounding alone
    "train.max_steps", "train.epochs", "train.micro_batch_size", "train.activation_checkpointing", "train.checkpoint_every",
    "train.keep_checkpoints", "train.deadline", "parallel.", "logging.", "evaluate.", "export.",
)  # fmt: skip
OF_THE_MODEL = ("method", "model.", "data.", "lora.")  # what a trained model and its prepared rows were made with
FROM_TRAINED = ("eval", "export", "report.html")  # made from what was trained
TRAINED = ("metrics.jsonl", "tensorboard", "checkpoints", "adapter", "model", "coverage.json", "scores", *FROM_TRAINED)


def is_begun(run_dir: Path) -> bool:
    """Whether training was started there."""
    return (run_dir / "metrics.jsonl").is_file()


def refuse_begun(run_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """A second start is a choice, and only a run's directory is one. Raises ConflictError where none was made, or two, before any work."""
    if resume and overwrite:
        raise ConflictError(
            f"{run_dir}: got --resume and --overwrite, expected one of them: the first goes on with the run, the second discards it"
        )
    if not (run_dir / "recipe.json").is_file() and (found := [name for name in TRAINED if (run_dir / name).exists()]):
        raise ConflictError(
            f"{run_dir}: holds {', '.join(found)} and no recipe.json, so it is no run's directory; choose another --run-dir or move them away"
        )
    if is_begun(run_dir) and not (resume or overwrite):
        raise ConflictError(f"{run_dir}: holds a run already; --resume goes on with it, --overwrite starts anew, name=... keeps both")


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in `run_dir` while the block lasts. Raises ConflictError where one does; no lock outlives its process."""
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        _lock(descriptor, run_dir)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, run_dir: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConflictError(f"{run_dir}: another process is training in it; wait for its end, or name=... trains beside it") from error
    except OSError:
        return  # a disk without locks


def open_run(recipe: Recipe, run_dir: Path, *, fingerprint: str, resume: bool, overwrite: bool) -> None:
    """Make `run_dir` ready to train in and record the run.

    Raises ConflictError where a resumed recipe or its data differ from the recorded ones, naming the keys.
    """
    if resume and is_begun(run_dir):
        problems = _differences(recipe, run_dir, ignore=MAY_CHANGE)
        if _record(run_dir)["data_fingerprint"] != fingerprint:
            problems.append("data: the rows, template or tokenizer have changed since the run was begun")
        if problems:
            remedy = "cannot be resumed with other settings; restore them, or use --overwrite or another name"
            raise ConflictError("\n".join([*problems, f"{run_dir}: {remedy}"]))
    elif overwrite:
        discard(run_dir)
    record(recipe, run_dir, fingerprint=fingerprint)


def record(recipe: Recipe, run_dir: Path, *, fingerprint: str) -> None:
    """Write recipe.json and environment.json: from now on the directory stands for its recipe."""
    write_json(run_dir / "recipe.json", {"recipe": dump(recipe), "data_fingerprint": fingerprint, "code_revision": _code_revision()})
    write_json(run_dir / "environment.json", environment.describe())


def require_same_model(recipe: Recipe, run_dir: Path, *, fingerprint: str | None = None) -> None:
    """Raise ConflictError where `recipe`, or prepared data of `fingerprint`, mean another model or other rows than the run was trained with."""
    if fingerprint not in (None, _record(run_dir)["data_fingerprint"]):
        raise ConflictError(
            f"{run_dir / 'data'}: prepared anew since the model was trained, maybe with test rows that it was trained on; "
            f"`nemotune data {run_dir} --overwrite` prepares those of the run again"
        )
    if problems := _differences(recipe, run_dir, only=OF_THE_MODEL):
        raise ConflictError(
            "\n".join([*problems, f"{run_dir}: name the run's directory in place of the recipe, which recalls its own settings"])
        )


def discard(run_dir: Path, names: tuple[str, ...] = TRAINED) -> None:
    """Remove what training and the stages after it left, or `names` of it; prepared data stay."""
    for name in names:
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _record(run_dir: Path) -> dict[str, Any]:
    path, remedy = run_dir / "recipe.json", "without it nothing says what this run is: put back a copy, or start in another directory"
    found = read_json(path, remedy=remedy)
    if not isinstance(found.get("recipe"), dict) or "data_fingerprint" not in found:
        raise DataError(f"{path}: got the keys {', '.join(found)}, expected recipe and data_fingerprint; {remedy}")
    return found


def _differences(recipe: Recipe, run_dir: Path, *, ignore: tuple[str, ...] = (), only: tuple[str, ...] = ("",)) -> list[str]:
    """A line per key in which `recipe` differs from the recorded one; keys by the beginnings of their names."""
    before, now = dict(_flat(_record(run_dir)["recipe"])), dict(_flat(dump(recipe)))
    return [
        f"{key}: got {now.get(key)!r}, the run was begun with {before.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.startswith(only) and not (ignore and key.startswith(ignore))
    ]


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree


def _code_revision() -> str | None:
    """The commit of the code, where it runs from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
