"""Checkpoints of a run: trained parameters, optimiser state and where the run stands, whole or absent.

`checkpoints/step_000200/` holds torch.distributed.checkpoint files and `trainer.json`. A checkpoint is written aside and renamed;
`latest` and `best` are files that hold a name. A directory without its last-written file is not a checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from nemotune.errors import CheckpointError
from nemotune.files import atomic_file, staged_directory, write_json
from nemotune.models import CausalLM
from nemotune.train.step import StepResult

TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` steps: beside weights and optimiser, all that what follows depends on."""

    step: int = 0
    tokens: int = 0
    loss_sum: float = 0.0  # over the supervised tokens since the last row of metrics
    supervised_tokens: int = 0  # their number
    usual_losses: tuple[float, ...] = ()  # with `spikes`, what the spike guard goes by
    spikes: int = 0
    best_loss: float | None = None
    evaluations_without_better: int = 0

    def after_step(self, result: StepResult, *, usual_losses: Iterable[float], spikes: int) -> Progress:
        """The progress with one more step counted."""
        return replace(
            self, step=self.step + 1, tokens=self.tokens + result.tokens, loss_sum=self.loss_sum + result.loss * result.supervised_tokens,
            supervised_tokens=self.supervised_tokens + result.supervised_tokens, usual_losses=tuple(usual_losses), spikes=spikes,
        )  # fmt: skip

    def after_row(self) -> Progress:
        """The progress with its losses written down."""
        return replace(self, loss_sum=0.0, supervised_tokens=0)

    def has_waited(self, patience: int | None) -> bool:
        """Whether `patience` evaluations have passed without a better loss."""
        return patience is not None and self.evaluations_without_better >= patience

    def after_evaluation(self, loss: float, *, better: bool) -> Progress:
        """The progress with one more validation counted."""
        if better:
            return replace(self, best_loss=loss, evaluations_without_better=0)
        return replace(self, evaluations_without_better=self.evaluations_without_better + 1)


class Checkpoints:
    """The checkpoints of one run directory; at most `keep`, plus the best."""

    def __init__(self, run_dir: Path, *, keep: int):
        self.directory, self.keep = run_dir / "checkpoints", keep

    def save(self, model: CausalLM, optimizer: Optimizer, progress: Progress, *, best: bool = False) -> None:
        """Write the checkpoint of `progress.step`, point `latest` (and `best`) at it, drop the oldest over `keep`."""
        name = _name(progress.step)
        with staged_directory(self.directory / name, overwrite=True) as aside:
            with _quiet():
                _save(_state(model, optimizer), aside)
            write_json(aside / "trainer.json", asdict(progress))
        for pointer in ("latest", "best") if best else ("latest",):
            with atomic_file(self.directory / pointer) as file:
                file.write_text(name + "\n", encoding="utf-8")
        self._drop_old()

    def has(self, step: int) -> bool:
        """Whether there is one of this step."""
        return (self.directory / _name(step) / "trainer.json").is_file()

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        whole = [path for path in self.directory.glob("step_*") if (path / "trainer.json").is_file() and (path / ".metadata").is_file()]
        return max(whole, default=None)

    def best(self) -> Path | None:
        """The checkpoint with the lowest validation loss, or None where there was no validation. Raises CheckpointError."""
        pointer = self.directory / "best"
        if not pointer.is_file():
            return None
        path = self.directory / pointer.read_text(encoding="utf-8").strip()
        if not (path / "trainer.json").is_file():
            raise CheckpointError(
                f"{pointer}: names {path.name}, which is no checkpoint; delete it to keep the last weights instead of the best"
            )
        return path

    def load(self, path: Path, model: CausalLM, optimizer: Optimizer) -> Progress:
        """Restore the trained parameters and the optimiser from `path`. Raises CheckpointError where it does not fit the run."""
        state = _state(model, optimizer)
        try:
            with _quiet():
                dcp.load(state, checkpoint_id=str(path), no_dist=True)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=TRAINED_ONLY)
            progress = Progress(**json.loads((path / "trainer.json").read_text(encoding="utf-8")))
            return replace(progress, usual_losses=tuple(progress.usual_losses))  # JSON has lists
        except (RuntimeError, ValueError, OSError, KeyError, dcp.api.CheckpointException) as error:
            reason = str(error).strip().splitlines()[-1]
            raise CheckpointError(
                f"{path}: cannot be resumed from ({reason}); delete it to go on from the one before, or start with --overwrite"
            ) from error

    def _drop_old(self) -> None:
        best = self.best()
        for path in sorted(self.directory.glob("step_*"))[: -self.keep]:
            if path != best:
                shutil.rmtree(path)


def _name(step: int) -> str:
    return f"step_{step:06}"


def _save(state: dict[str, Any], directory: Path) -> None:
    try:
        dcp.save(state, checkpoint_id=str(directory), no_dist=True)
    except dcp.api.CheckpointException as error:  # it wraps each process's own error: here there is one
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, RuntimeError) and "inline_container" in str(cause):  # torch's zip writer hides that the disk is full
            raise OSError(errno.ENOSPC, str(cause)) from error
        raise cause from error


def _state(model: CausalLM, optimizer: Optimizer) -> dict[str, Any]:
    parameters, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {"model": {name: value for name, value in parameters.items() if name in trained}, "optimizer": moments}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.distributed.checkpoint warns that it runs in one process: so it is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed.*")
        yield
