"""What a checkpoint of a run holds, which one is the newest, and that reading one runs no code."""

from __future__ import annotations

import concurrent.futures
import copy
import errno
import logging
import math
import os
import pickle
import re
import threading
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from toy_split import ToySplit

from nemotune.data.loader import Loader
from nemotune.errors import CheckpointError, DiskFullError
from nemotune.lora import apply_lora, lora_modules
from nemotune.models import load_model
from nemotune.recipe import Lora, Train
from nemotune.train import checkpoint, state
from nemotune.train.checkpoint import Checkpoints, Progress
from nemotune.train.optim import make_optimizer
from nemotune.train.step import accumulate
from nemotune.weights.dcp_metadata import load_metadata


def test_a_checkpoint_of_lora_holds_the_adapters_and_their_moments_alone(hybrid_dir, tmp_path):
    model = load_model(hybrid_dir, dtype="float32").train()
    keys = apply_lora(model, Lora(rank=2))
    optimizer = make_optimizer({name: p for name, p in model.named_parameters() if p.requires_grad}, Train())
    accumulate(model, Loader(ToySplit([9]), global_batch_size=1, micro_batch_size=1, seed=0).step(0), keys=keys, seed=0, step=0)
    optimizer.step()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(model, optimizer, Progress(step=1))
    held = FileSystemReader(checkpoints.latest()).read_metadata().state_dict_metadata
    adapters = {f"{name}.{which}" for name, _ in lora_modules(model) for which in ("lora_A", "lora_B")}
    assert {key.removeprefix("model.") for key in held if key.startswith("model.")} == adapters
    moments = {key.removeprefix("optimizer.state.") for key in held if key.startswith("optimizer.state.")}
    assert moments == {f"{name}.{moment}" for name in adapters for moment in ("exp_avg", "exp_avg_sq", "step")}


class Command:
    """Runs code where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def layer():
    """A layer that took one step, and its optimiser."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(dict(layer.named_parameters()), Train())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    return layer, optimizer


def damaged(error, path):
    """The message about a checkpoint says why, and what to do."""
    return rf"{path}: cannot be resumed from \({error}.*\); delete it to go on from the one before, or start with --overwrite"


def test_metadata_that_would_run_code_are_refused_and_run_none(layer, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(*layer, Progress(step=1))
    path = checkpoints.latest()
    (path / ".metadata").write_bytes(pickle.dumps(Command(tmp_path / "run")))
    with pytest.raises(CheckpointError, match=damaged(r"\.metadata names posix\.mkdir, which .* does not write", path)):
        checkpoints.load(path, *layer)
    with pytest.raises(CheckpointError, match=r"got step_000001 \(\.metadata names posix\.mkdir.*\), none that is whole"):
        checkpoints.latest()
    assert not (tmp_path / "run").exists()


def test_an_entry_that_would_run_code_is_refused_and_runs_none(layer, tmp_path):
    """In a file of the length that the metadata say."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(*layer, Progress(step=1))
    path = checkpoints.latest()
    torch.save(Command(tmp_path / "run"), path / "command")
    metadata = load_metadata(path)
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == "model.weight")
    place.relative_path, place.offset, place.length = "command", 0, (path / "command").stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=damaged("", path)):
        checkpoints.load(checkpoints.latest(), *layer)
    assert not (tmp_path / "run").exists()


def test_the_classes_that_metadata_may_name_are_those_that_torch_writes(layer, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(*layer, Progress(step=1))
    ours, theirs = load_metadata(checkpoints.latest()), FileSystemReader(checkpoints.latest()).read_metadata()
    assert ours == replace(theirs, storage_meta=ours.storage_meta)  # which counts its readings


@pytest.mark.parametrize("keep", [0, 1, 40, 400, -1])
def test_metadata_that_were_cut_off_are_named_in_one_line(layer, tmp_path, keep, capfd, caplog):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(*layer, Progress(step=1))
    path = checkpoints.latest()
    (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=damaged("", path)):
        checkpoints.load(path, *layer)
    assert capfd.readouterr() == ("", "") and not [record for record in caplog.records if record.levelno > logging.DEBUG]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": 1, "later_field": 1}'])
def test_a_position_of_another_kind_is_named_and_nothing_is_loaded(layer, tmp_path, content):
    model, optimizer = layer
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(model, optimizer, Progress(step=1))
    path = checkpoints.latest()
    (path / "trainer.json").write_text(content)
    with torch.no_grad():
        model.weight.zero_()
    with pytest.raises(CheckpointError, match=damaged("", path)) as error:
        checkpoints.load(path, model, optimizer)
    with pytest.raises(CheckpointError, match="none that is whole"):
        checkpoints.latest()
    assert not model.weight.any()
    assert "later_field" not in content or "trainer.json has later_field: another version" in str(error.value)


def test_a_gpu_that_is_too_small_is_no_damage_of_the_checkpoint(layer, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(*layer, Progress(step=1))

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(state, "read_blocks", fails)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoints.load(checkpoints.latest(), *layer)


def test_a_position_without_its_best_step_is_resumed_from(layer, tmp_path):
    """As of versions that had it in a file `best`; the loop then says that the best counts anew."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(*layer, Progress(step=1))
    position = checkpoints.latest() / "trainer.json"
    position.write_text('{"step": 1, "best_loss": 2.0}')
    progress = checkpoints.load(checkpoints.latest(), *layer)
    assert progress == Progress(step=1, best_loss=2.0) and checkpoints.best(progress) is None


def test_the_newest_is_that_of_the_most_steps_whatever_their_digits(layer, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (999_999, 1_000_000):
        checkpoints.save(*layer, Progress(step=step))
    checkpoints.wait()
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step_1000000"] == [checkpoints.latest().name]


@pytest.fixture
def slow(monkeypatch):
    """Writing waits for this event."""
    event, write = threading.Event(), checkpoint.write_blocks

    def wait_and_write(*args, **options):
        assert event.wait(30)
        write(*args, **options)

    monkeypatch.setattr(checkpoint, "write_blocks", wait_and_write)
    return event


def moved(model, optimizer):
    """Everything that a checkpoint holds of them is another than it was."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *(moment for state in optimizer.state.values() for moment in state.values())]:
            tensor.add_(1.0)


def test_what_is_trained_while_a_checkpoint_is_written_is_not_in_it(layer, tmp_path, slow):
    model, optimizer = layer
    before = [p.detach().clone() for p in model.parameters()], copy.deepcopy(optimizer.state_dict()["state"])
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(model, optimizer, Progress(step=1))
    moved(model, optimizer)
    assert not list(checkpoints.directory.glob("step_*"))
    slow.set()
    checkpoints.load(checkpoints.latest(), model, optimizer)
    assert all(torch.equal(p, then) for p, then in zip(model.parameters(), before[0], strict=True))
    states = optimizer.state_dict()["state"]
    assert all(torch.equal(states[i][key], then) for i, state in before[1].items() for key, then in state.items())


def test_a_checkpoint_that_is_copied_is_the_one_that_is_waited_for(layer, tmp_path, monkeypatch):
    """To the byte, but for where and when it was written."""
    files = []
    for name, free in (("copied", math.inf), ("waited", 0.0)):
        monkeypatch.setattr(checkpoint, "free_host_memory", lambda free=free: free)
        told: list[str] = []
        checkpoints = Checkpoints(tmp_path / name, keep=1, say=told.append)
        for _ in range(2):
            checkpoints.save(*layer, Progress(step=1))
        assert [line.partition(":")[0] for line in told] == ["checkpoints are waited for"] * (free == 0), "once"
        assert free or (checkpoints.directory / "step_000001").is_dir(), "without memory for copies it is there at once"
        path = checkpoints.latest()
        files.append({file.name: file.read_bytes() for file in path.iterdir() if file.name != ".metadata"})
    assert files[0] == files[1] and len(files[0]) == 2


def test_an_error_in_the_background_stops_the_run(layer, tmp_path, monkeypatch):
    def fails(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_blocks", fails)
    said = rf"{tmp_path}/checkpoints/step_000001: the disk is full; nothing was left behind"
    for found_by in (
        Checkpoints.wait,
        Checkpoints.latest,
        lambda all_: all_.best(Progress()),
        lambda all_: all_.save(*layer, Progress(step=2)),
    ):
        checkpoints = Checkpoints(tmp_path, keep=1)
        checkpoints.save(*layer, Progress(step=1))
        with pytest.raises(DiskFullError, match=said):
            found_by(checkpoints)
    checkpoints.save(*layer, Progress(step=1))
    concurrent.futures.wait([checkpoints._writing])
    with pytest.raises(DiskFullError, match=said):
        checkpoints.check()
    with pytest.raises(DiskFullError, match=said), checkpoints:
        checkpoints.save(*layer, Progress(step=1))
    with pytest.raises(KeyboardInterrupt), checkpoints:
        checkpoints.save(*layer, Progress(step=1))
        raise KeyboardInterrupt


@pytest.mark.parametrize("damage", ["cut", "lost", "longer"])
def test_a_damaged_file_is_found_before_anything_is_read(layer, tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(*layer, Progress(step=step))
    checkpoints.wait()
    [file] = (checkpoints.directory / "step_000003").glob("*.distcp")
    size = file.stat().st_size
    if damage == "lost":
        file.unlink()
    else:
        os.truncate(file, size - 1 if damage == "cut" else size + 1)
    (checkpoints.directory / "step_000002" / "trainer.json").write_text('{"st')
    warnings = []
    assert checkpoints.latest(warn=warnings.append).name == "step_000001"
    what = "is missing" if damage == "lost" else rf"has {size + (-1 if damage == 'cut' else 1)} bytes, expected {size}"
    assert re.fullmatch(rf"{checkpoints.directory}/step_000003: damaged \({file.name} {what}\), passed over", warnings[0])
    assert warnings[1].startswith(f"{checkpoints.directory}/step_000002: damaged (") and len(warnings) == 2
    assert not checkpoints.has(3) and checkpoints.has(1) and checkpoints.best(Progress(best_step=3)) is None
    with Checkpoints(tmp_path, keep=1) as fewer:
        fewer.save(*layer, Progress(step=4))
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["step_000002", "step_000003", "step_000004"], (
        "and is not deleted"
    )


def test_what_a_killed_process_left_half_written_goes(layer, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    (checkpoints.directory / ".step_000007.partial").mkdir(parents=True)
    checkpoints.save(*layer, Progress(step=1))
    assert checkpoints.latest().name == "step_000001"
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step_000001"]
