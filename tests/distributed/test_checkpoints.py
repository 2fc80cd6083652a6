"""A checkpoint that some processes saved is resumed by any others: one, two or four, however they share the model."""

from __future__ import annotations

import io
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from random_models import make
from rich.console import Console
from toy_loop import HELD_OUT, SETTINGS, SPLIT, rows
from toy_split import ToySplit
from toy_steps import LENGTHS, PACKS, TARGETS, Case

from nemotune.data.loader import Loader
from nemotune.distributed import Gradients, World, arrange, connect, divide, layouts_of, replicas
from nemotune.distributed.gradients import local
from nemotune.distributed.world import BATCHES
from nemotune.lora import apply_lora
from nemotune.models import load_model
from nemotune.recipe import Lora, Train, load
from nemotune.recipe.degrees import Degrees
from nemotune.train import run, storage
from nemotune.train.checkpoint import Checkpoints, Progress
from nemotune.train.optim import make_optimizer
from nemotune.train.step import accumulate, update

TWO = [Degrees(data=2), Degrees(shard=2), Degrees(context=2), Degrees(tensor=2), Degrees(data=2, expert=2), Degrees(pipeline=2)]
FOUR = [Degrees(data=4), Degrees(shard=2, tensor=2)]
SAVED, LAST, RATE = 3, 6, 1e-3


class Trainer:
    """What takes the steps of `case` with this process's part of `world`, and its checkpoints."""

    def __init__(self, case: Case, directory: Path, world: World):
        self.world, self.directory = world, directory
        ready = partial(divide, world=world, compute_dtype=torch.float32)
        full = case.method != "lora"
        self.model = load_model(case.directory, dtype="float32", trainable=full, arrange=partial(arrange, world=world), ready=ready)
        self.keys = None if full else apply_lora(self.model, Lora(rank=4, alpha=8, targets=TARGETS[self.model.family]))
        connect(self.model, world, self.keys)
        self.model.train()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        layouts = layouts_of(self.model)
        self.gradients = Gradients(self.parameters, layouts, replicas=replicas(self.model), world=world)
        if case.optimizer == "sgd":  # several groups, one of them empty here and there
            groups = [{"params": [p for name, p in self.parameters.items() if ("mixer" in name) == within]} for within in (False, True)]
            self.optimizer: Any = torch.optim.SGD([group for group in groups if group["params"]], lr=RATE, momentum=0.9, foreach=False)
        else:
            self.optimizer = make_optimizer(self.parameters, Train(learning_rate=RATE, weight_decay=0.1))
        hand = (world.index(*BATCHES), world.degree(*BATCHES))
        self.loader = Loader(ToySplit(LENGTHS, packs=PACKS), global_batch_size=4, micro_batch_size=1, seed=0, hand=hand)
        self.checkpoints = Checkpoints(directory, keep=1, layouts=layouts, world=world)

    def steps(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            losses.append(accumulate(self.model, self.loader.step(step), keys=self.keys, seed=3, step=step, world=self.world).loss)
            self.gradients.reduce()
            norm = self.gradients.norm()
            update(self.parameters.values(), self.optimizer, learning_rate=RATE, grad_norm=norm, max_grad_norm=1.0)
        return losses

    def save_and_go_on(self) -> list[float]:
        """All losses, those after the checkpoint computed while it is being written."""
        losses = self.steps(0, SAVED)
        with self.checkpoints:
            self.checkpoints.save(self.model, self.optimizer, Progress(step=SAVED))
            return losses + self.steps(SAVED, LAST)

    def resume(self) -> list[float]:
        newest = self.checkpoints.latest()
        assert newest is not None and self.checkpoints.load(newest, self.model, self.optimizer) == Progress(step=SAVED)
        return self.steps(SAVED, LAST)


def resume(cases: dict[str, Case], where: dict[tuple[str, str], Path], degrees: list[Degrees]) -> dict[Any, list[float]]:
    """The losses behind each checkpoint under each of `degrees`."""
    worlds = [World(each, rank=dist.get_rank()) for each in degrees]
    return {
        (str(world.degrees), *saved): Trainer(cases[saved[1]], directory, world).resume()
        for world in worlds
        for saved, directory in where.items()
    }


def save_and_resume(
    cases: dict[str, Case], by_one: dict[tuple[str, str], Path], root: Path
) -> tuple[dict[Any, list[float]], dict[Any, list[float]]]:
    """In two processes: checkpoints under each layout, and losses behind those of one process."""
    saved = {}
    for each in TWO:
        for name, case in cases.items():
            saved[str(each), name] = Trainer(case, root / f"{TWO.index(each)}-{name}", World(each, rank=dist.get_rank())).save_and_go_on()
    return saved, resume(cases, by_one, TWO)


def near(mine: list[float], theirs: list[float]) -> bool:
    return len(mine) == len(theirs) and all(abs(a - b) <= 1e-5 * b for a, b in zip(mine, theirs, strict=True))


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    directory = tmp_path_factory.mktemp("models") / "hybrid"
    make("hybrid").save_pretrained(directory)
    return {
        "lora": Case(directory, optimizer="adamw"),
        "full": Case(directory, method="full", optimizer="adamw"),
        "sgd": Case(directory, method="full"),
    }


def test_a_checkpoint_is_resumed_by_any_number_of_processes(cases, tmp_path):
    by_one = {("one", name): tmp_path / name for name in cases}
    alone = {name: Trainer(case, tmp_path / name, World()).save_and_go_on() for name, case in cases.items()}
    for name, case in cases.items():
        assert Trainer(case, tmp_path / name, World()).resume() == alone[name][SAVED:], "to the last bit"

    saved, resumed = in_processes(2, save_and_resume, cases, by_one, tmp_path)
    assert all(near(losses, alone[key[-1]]) for key, losses in saved.items()), (saved, alone)
    by_two = {(str(each), name): tmp_path / f"{i}-{name}" for i, each in enumerate(TWO) for name in cases}
    for (_, name), directory in by_two.items():
        resumed["one", directory.name, name] = Trainer(cases[name], directory, World()).resume()
    resumed |= in_processes(4, resume, cases, {key: directory for key, directory in (by_one | by_two).items() if key[-1] == "full"}, FOUR)
    assert not {key: losses for key, losses in resumed.items() if not near(losses, alone[key[-1]][SAVED:])}, alone

    files = sorted(path.stat().st_size for path in (tmp_path / "0-full" / "checkpoints").rglob("*.distcp"))
    [whole] = [path.stat().st_size for path in (tmp_path / "full" / "checkpoints").rglob("*.distcp")]
    assert len(files) == 2 and sum(files) < 1.1 * whole and files[1] < 1.5 * files[0], "each block once, by turns"


def run_with_a_best(directory: Path, to: Path, world: World, *, resume: bool) -> tuple[str, list[str], list[dict], bool]:
    """Four steps at a rate that spoils what two have learned: which weights are kept, what is told, metrics, whether they are the best's."""
    model = load_model(
        directory, dtype="float32", arrange=partial(arrange, world=world), ready=partial(divide, world=world, compute_dtype=torch.float32)
    )
    recipe = load("quickstart", (*SETTINGS, "train.max_steps=4", "train.eval_every=1", "train.learning_rate=1.0", "lora.dropout=0.0"))
    keys = apply_lora(model, recipe.lora)
    connect(model, world, keys)
    told = io.StringIO()
    given: Any = {"train": SPLIT, "validation": HELD_OUT, "run_dir": to, "keys": keys, "resume": resume}
    result = run(model, recipe, **given, console=Console(file=told, width=300), world=world)
    held = {name: local(p).detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    checkpoints = Checkpoints(to, keep=1, layouts=layouts_of(model), world=world)
    best = min((row for row in rows(to, "eval") if row["step"]), key=lambda row: row["loss"])["step"]
    path = checkpoints.best(Progress(best_step=best))
    assert path is not None and best < 4, "not the last"
    checkpoints.load(path, model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
    is_best = all(torch.equal(local(p), held[name]) for name, p in model.named_parameters() if name in held)
    return result.weights, told.getvalue().splitlines(), rows(to, "eval"), is_best and result.best_validation_loss is not None


def stopped_by_a_signal_to_one(directory: Path, to: Path) -> list[tuple[str, int]]:
    """How the run of each of two processes ended, the second of which alone is told to stop."""
    world = World(Degrees(data=2), rank=dist.get_rank())
    model = load_model(directory, dtype="float32", arrange=partial(arrange, world=world))
    recipe = load("quickstart", (*SETTINGS, "train.max_steps=50"))
    keys = apply_lora(model, recipe.lora)
    connect(model, world, keys)
    if world.rank == 1:
        model.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    given: Any = {"train": SPLIT, "validation": None, "run_dir": to, "keys": keys, "resume": False}
    result = run(model, recipe, **given, console=Console(quiet=True), world=world)
    return world.gather((result.ended, result.steps))


def run_twice(directory: Path, to: Path) -> list[Any]:
    """A run, and its resuming where the newest checkpoint is damaged."""
    assert stopped_by_a_signal_to_one(directory, to / "signalled") == [("stopped at the deadline", 1)] * 2
    found = []
    for each in (Degrees(data=2), Degrees(tensor=2)):
        world = World(each, rank=dist.get_rank())
        where = to / str(world.degrees.tensor)
        whole = run_with_a_best(directory, where, world, resume=False)
        if world.is_first:
            os.truncate(where / "checkpoints" / "step_000004" / "__1_0.distcp", 10)
        world.barrier()
        found.append((whole, run_with_a_best(directory, where, world, resume=True)))
    return found


def test_a_run_of_two_goes_on_from_the_newest_whole_checkpoint_and_keeps_the_best(cases, tmp_path):
    for whole, resumed in in_processes(2, run_twice, cases["lora"].directory, tmp_path):
        assert whole[0] == resumed[0] == "best" and whole[3] and resumed[3]
        assert [line for line in resumed[1] if "step_000004: damaged (__1_0.distcp has 10 bytes, expected " in line]
        assert len([line for line in resumed[1] if line.startswith("resumed after step ")]) == 1
        assert [row["step"] for row in resumed[2]] == [row["step"] for row in whole[2]]
        assert near([row["loss"] for row in resumed[2]], [row["loss"] for row in whole[2]])


def killed_while_writing(case: Case, directory: Path) -> None:
    """The second process is lost while it writes the second checkpoint, and the first one with it."""
    trainer = Trainer(case, directory, World(Degrees(data=2), rank=dist.get_rank()))
    trainer.steps(0, 1)
    trainer.checkpoints.save(trainer.model, trainer.optimizer, Progress(step=SAVED))
    trainer.checkpoints.wait()
    if dist.get_rank() == 1:
        storage._Writer.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    trainer.checkpoints.save(trainer.model, trainer.optimizer, Progress(step=SAVED + 1))
    trainer.checkpoints.wait()


def test_a_process_that_is_lost_while_writing_leaves_whole_checkpoints(cases, tmp_path):
    with pytest.raises(Exception, match=r"SIGKILL|terminated"):
        in_processes(2, killed_while_writing, cases["lora"], tmp_path)
    trainer = Trainer(cases["lora"], tmp_path, World())
    assert trainer.checkpoints.latest() == tmp_path / "checkpoints" / "step_000003"
    trainer.resume()
    with trainer.checkpoints:
        trainer.checkpoints.save(trainer.model, trainer.optimizer, Progress(step=LAST))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000006"], "and nothing half of it stays"
