"""Checkpoints of a run: trained parameters, optimiser state and where the run stands, whole or absent.

`checkpoints/step_000200/` holds torch.distributed.checkpoint files (`state.py`) and `trainer.json`, and is written aside and renamed. Which
one is the best is in `trainer.json`; a directory that lost one of its files is no checkpoint, counts as none and is not deleted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from torch.optim import Optimizer

from nemotune.errors import CheckpointError
from nemotune.files import staged_directory, write_json
from nemotune.models import CausalLM
from nemotune.train.state import METADATA, load_state, save_state
from nemotune.train.step import StepResult

PROGRESS = "trainer.json"


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
    best_step: int | None = None  # of the checkpoint that has it
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
            return replace(self, best_loss=loss, best_step=self.step, evaluations_without_better=0)
        return replace(self, evaluations_without_better=self.evaluations_without_better + 1)

    def without_best(self) -> Progress:
        """The progress as if no validation had been."""
        return replace(self, best_loss=None, best_step=None, evaluations_without_better=0)


class Checkpoints:
    """The checkpoints of one run directory: the newest `keep`, and the best."""

    def __init__(self, run_dir: Path, *, keep: int):
        self.directory, self.keep = run_dir / "checkpoints", keep

    def save(self, model: CausalLM, optimizer: Optimizer, progress: Progress) -> None:
        """Write the checkpoint of `progress.step`, then drop the oldest over `keep` but for the best."""
        with staged_directory(self._path(progress.step), overwrite=True) as aside:
            save_state(model, optimizer, aside)
            write_json(aside / PROGRESS, asdict(progress))
        best = self.best(progress)
        for path in self._whole()[: -self.keep]:
            if path != best:
                shutil.rmtree(path)

    def has(self, step: int) -> bool:
        """Whether there is one of this step."""
        return _is_whole(self._path(step))

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None where none was saved. Raises CheckpointError where some were and none is whole."""
        if whole := self._whole():
            return whole[-1]
        if found := self._saved():
            names = ", ".join(path.name for path in found)
            raise CheckpointError(
                f"{self.directory}: got {names}, none with both {PROGRESS} and {METADATA}, so none can be resumed from; "
                "put back a copy, or start again with --overwrite"
            )
        return None

    def best(self, progress: Progress) -> Path | None:
        """The checkpoint with the lowest validation loss, or None where there was no validation or it is gone."""
        return self._path(progress.best_step) if progress.best_step is not None and self.has(progress.best_step) else None

    def load(self, path: Path, model: CausalLM, optimizer: Optimizer) -> Progress:
        """Restore the trained parameters and the optimiser from `path`. Raises CheckpointError where it does not fit the run."""
        try:
            progress = _read_progress(path / PROGRESS)
            load_state(model, optimizer, path)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be resumed from ({error}); delete it to go on from the one before, or start with --overwrite"
            ) from error
        return progress

    def _path(self, step: int) -> Path:
        return self.directory / f"step_{step:06}"

    def _saved(self) -> list[Path]:
        """Every directory of a step, oldest first: six digits are the least, not the most."""
        found = [path for path in self.directory.glob("step_*") if path.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def _whole(self) -> list[Path]:
        return [path for path in self._saved() if _is_whole(path)]


def _is_whole(path: Path) -> bool:
    return (path / PROGRESS).is_file() and (path / METADATA).is_file()


def _read_progress(path: Path) -> Progress:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or "step" not in found:
        raise ValueError(f"{path.name} does not say after which step it was written")
    if unknown := found.keys() - {field.name for field in fields(Progress)}:
        raise ValueError(f"{path.name} has {', '.join(sorted(unknown))}: another version of nemotune wrote it")
    return Progress(**{**found, "usual_losses": tuple(found.get("usual_losses", ()))})  # JSON has lists
