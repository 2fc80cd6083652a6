"""Checkpoints of a run: trained parameters, optimiser state and where the run stands, whole or absent.

`checkpoints/step_000200/` holds torch.distributed.checkpoint files (what is in them: `state.py`; how: `storage.py`) and `trainer.json`. It is
written aside while the run goes on, and renamed. Which one is the best is in `trainer.json`; a directory that lost a file, or the end of one,
counts as none and is not deleted. Every process calls the same methods in the same order; the first one looks, deletes and decides.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.optim import Optimizer

from nemotune.distributed import World
from nemotune.distributed.world import ALONE, PATIENCE
from nemotune.errors import CheckpointError
from nemotune.files import disk_full_is_readable, write_json
from nemotune.models import CausalLM
from nemotune.train.state import Place, blocks_to_write, kept_layouts, load_state, shares
from nemotune.train.step import StepResult
from nemotune.train.storage import Block, write_blocks
from nemotune.weights import Layout
from nemotune.weights.dcp_metadata import require_files
from nemotune.weights.host_memory import free_host_memory

PROGRESS = "trainer.json"
NOTHING = nullcontext()
Seen = TypeVar("Seen")


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
    """The checkpoints of one run directory: the newest `keep`, and the best.

    `layouts` says which parts this process of `world` holds of the model's tensors, those that it does not name being whole.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int,
        layouts: Mapping[str, Layout] | None = None,
        world: World = ALONE,
        say: Callable[[str], None] = lambda _: None,
    ):
        self.directory, self.keep, self.layouts, self.world, self.say = run_dir / "checkpoints", keep, layouts or {}, world, say
        self._has_said = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._share: Mapping[str, set[Place]] | None = None
        self._group: Any = None  # of all processes, for the thread

    def save(self, model: CausalLM, optimizer: Optimizer, progress: Progress, *, during: AbstractContextManager[object] = NOTHING) -> None:
        """Copy what the checkpoint of `progress.step` holds, and begin to write it; when it is there, the oldest over `keep` go, but for the best.

        An earlier one is waited for, and so is this one where a host has no memory for the copies, which `say` is told once. `during` lasts
        until all is written.
        """
        self.wait()
        if self._share is None:
            self._begin(model)
        assert self._share is not None
        with ExitStack() as stack:
            stack.enter_context(during)
            blocks = blocks_to_write(model, optimizer, self.layouts, self._share)
            needed = sum(block.values.nbytes for block in blocks)
            fits = not self.world.any(2 * needed >= free_host_memory())
            copies = [block.on_host() for block in blocks] if fits else blocks
            self._writing = self._thread.submit(self._write, copies, progress, stack.pop_all())
        if not fits:
            if not self._has_said:
                self.say(
                    f"checkpoints are waited for: a copy of one, {needed / 1e9:.2f} GB a process, would take half of a host's free memory"
                )
                self._has_said = True
            self.wait()

    def wait(self) -> None:
        """Wait for what is being written. Raises what went wrong with it, DiskFullError for one."""
        if self._writing is not None:
            written, self._writing = self._writing, None
            written.result()

    def check(self) -> None:
        """Raise what went wrong with the last one written, if it is known yet; waits for nothing."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Wait; where the run ends by an error of its own, that one is raised."""
        try:
            self.wait()
        except Exception:
            if kind is None:
                raise

    def has(self, step: int) -> bool:
        """Whether there is one of this step."""
        return self._decide(lambda: _problem(self._path(step)) is None)

    def latest(self, warn: Callable[[str], None] = lambda _: None) -> Path | None:
        """The newest whole checkpoint, or None where none was saved; `warn` is told of newer ones that are damaged.

        Raises CheckpointError where some were saved and none is whole.
        """
        found, damaged = self._decide(self._newest)
        if found is None and damaged:
            names = ", ".join(f"{path.name} ({problem})" for path, problem in reversed(damaged))
            raise CheckpointError(
                f"{self.directory}: got {names}, none that is whole, so none can be resumed from; put back a copy, or start again with --overwrite"
            )
        for path, problem in damaged:
            warn(f"{path}: damaged ({problem}), passed over")
        return found

    def best(self, progress: Progress) -> Path | None:
        """The checkpoint with the lowest validation loss, or None where there was no validation or it is gone."""
        step = progress.best_step
        self.wait()
        return self._path(step) if step is not None and self.has(step) else None

    def load(self, path: Path, model: CausalLM, optimizer: Optimizer) -> Progress:
        """Restore the trained parameters and the optimiser from `path`. Raises CheckpointError where it does not fit the run."""
        self.wait()
        try:
            progress = _read_progress(path / PROGRESS)
            load_state(model, optimizer, self.layouts, path)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be resumed from ({error}); delete it to go on from the one before, or start with --overwrite"
            ) from error
        return progress

    def _begin(self, model: CausalLM) -> None:
        """Tell the processes what each has to write, and give their threads a group, so that they do not meet those that train."""
        self._share = shares(self.world.gather(kept_layouts(model, self.layouts)))[self.world.rank]
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.world.size > 1 else None

    def _write(self, blocks: Sequence[Block], progress: Progress, during: AbstractContextManager[object]) -> None:
        """What the thread does."""
        target = self._path(progress.step)
        with during, disk_full_is_readable(target):
            write_blocks(blocks, target, beside=lambda aside: write_json(aside / PROGRESS, asdict(progress)), group=self._group)
        if self.world.is_first:
            self._tidy(progress)

    def _tidy(self, progress: Progress) -> None:
        """Delete the oldest, and what a process that was killed has left unfinished."""
        whole = [path for path in self._saved() if _problem(path) is None]
        for path in [*whole[: -self.keep], *self.directory.glob(".step_*.partial")]:
            if progress.best_step is None or path != self._path(progress.best_step):
                shutil.rmtree(path)

    def _decide(self, look: Callable[[], Seen]) -> Seen:
        """What the first process sees when all is written, for everyone."""
        self.wait()
        seen: Seen = self.world.agree(look() if self.world.is_first else None)
        return seen

    def _newest(self) -> tuple[Path | None, list[tuple[Path, str]]]:
        """The newest whole checkpoint, and the newer ones with what is wrong with them."""
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self._saved()):
            if (problem := _problem(path)) is None:
                return path, damaged
            damaged.append((path, problem))
        return None, damaged

    def _path(self, step: int) -> Path:
        return self.directory / f"step_{step:06}"

    def _saved(self) -> list[Path]:
        """Every directory of a step, oldest first: six digits are the least, not the most."""
        found = [path for path in self.directory.glob("step_*") if path.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]))


def _problem(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, none of whose tensors is read; None where it is whole."""
    try:
        _read_progress(path / PROGRESS)
        require_files(path)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _read_progress(path: Path) -> Progress:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or "step" not in found:
        raise ValueError(f"{path.name} does not say after which step it was written")
    if unknown := found.keys() - {field.name for field in fields(Progress)}:
        raise ValueError(f"{path.name} has {', '.join(sorted(unknown))}: another version of nemotune wrote it")
    return Progress(**{**found, "usual_losses": tuple(found.get("usual_losses", ()))})  # JSON has lists
