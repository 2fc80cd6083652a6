"""A run with a deadline is saved before it and goes on as if it had never stopped. The clock is the test's."""

from __future__ import annotations

import itertools
import json
import os
import signal

import pytest
import torch
from toy_loop import Clock, rows

from nemotune.errors import AFTER_SIGNAL, TrainingError
from nemotune.train import checkpoint, health
from nemotune.train.checkpoint import Checkpoints
from nemotune.train.deadline import RECENT_STEPS, Deadline

STEP, VALIDATION, CHECKPOINT = 10.0, 6.0, 4.0


@pytest.fixture
def clock(monkeypatch):
    """Checkpoints take CHECKPOINT seconds, which training waits for; `at_work` makes a model's passes take theirs."""
    clock, save, write = Clock(1000.0), Checkpoints.save, checkpoint.write_blocks

    def write_slowly(*args, **options):
        clock.now += CHECKPOINT
        write(*args, **options)

    def save_and_wait(self, *args, **options):
        save(self, *args, **options)
        self.wait()

    monkeypatch.setattr(checkpoint, "write_blocks", write_slowly)
    monkeypatch.setattr(Checkpoints, "save", save_and_wait)
    return clock


def at_work(clock):
    """Doctor a model so that each of a step's two micro batches takes half of STEP, and each validation, one batch, VALIDATION."""

    def before(model, inputs):
        clock.now += STEP / 2 if model.training else VALIDATION

    return lambda model: model.register_forward_pre_hook(before)


def measured(clock, *, seconds=100.0, **parts):
    """A deadline `seconds` away that has seen parts take these times."""
    deadline = Deadline(clock() + seconds, clock=clock)
    start = clock.now
    for part, times in parts.items():
        for took in times:
            with deadline.watch(part):
                clock.now += took
    clock.now = start
    return deadline


NEXT = {"checkpoint_bytes": 400e6, "validation_steps": 0.0}


@pytest.mark.parametrize(
    ("parts", "following", "needed"),
    [
        ({}, {}, 6 + 5),  # three checkpoints of 400 MB at 200 MB/s, and a twentieth of 100 s
        ({"step": [3, 10, 4]}, {}, 10 + 6 + 5),
        ({"step": [10], "checkpoint": [4, 1]}, {}, 10 + 12 + 5),
        ({"step": [10], "checkpoint": [4], "validation": [7, 2]}, {}, 10 + 12 + 5),
        ({"step": [10], "checkpoint": [4], "validation": [7, 2]}, {"validation_steps": 3.0}, 10 + 7 + 12 + 5),
        ({"step": [10], "checkpoint": [4]}, {"validation_steps": 1.5}, 10 + 15 + 12 + 5),
        ({"step": [30] + [10] * RECENT_STEPS, "checkpoint": [4]}, {}, 10 + 12 + 5),
    ],
)
def test_a_step_begins_only_while_it_and_all_that_follows_fit(parts, following, needed):
    clock = Clock(1000.0)
    deadline = measured(clock, **parts)
    start = clock.now
    clock.now = start + 100 - needed
    assert deadline.leaves_time(**NEXT | following) and not deadline.has_come()
    clock.now += 0.01
    assert not deadline.leaves_time(**NEXT | following) and deadline.has_come()


def test_a_checkpoint_that_is_being_written_is_one_more_to_wait_for():
    clock = Clock(1000.0)
    deadline = measured(clock, step=[10], checkpoint=[4])
    with deadline.watch("checkpoint"):
        clock.now += 1
        assert deadline.reckon(**NEXT)["end_seconds"] == 4 * 4 + 5
        clock.now += 6
        assert deadline.reckon(**NEXT)["end_seconds"] == 4 * 7 + 5, "it takes longer than any before"
    assert deadline.reckon(**NEXT)["end_seconds"] == 3 * 7 + 5


def test_the_margin_of_a_long_run_is_a_minute():
    clock = Clock(1000.0)
    deadline = Deadline(clock() + 43200, clock=clock)
    clock.now += 43200 - 60 - 6
    assert deadline.leaves_time(**NEXT)
    clock.now += 0.01
    assert not deadline.leaves_time(**NEXT)


def test_without_a_deadline_there_is_always_time():
    clock = Clock(1000.0)
    deadline = Deadline(clock=clock)
    clock.now = 1e12
    assert deadline.leaves_time(checkpoint_bytes=1e15, validation_steps=1e9) and not deadline.has_come()


def test_it_has_come_once_it_is_past():
    clock = Clock(1000.0)
    deadline = Deadline(clock() + 10, clock=clock)
    clock.now += 9.9
    assert not deadline.has_come()
    clock.now += 0.1
    assert deadline.has_come()


def test_a_run_is_saved_before_its_deadline(train, clock, tmp_path):
    """Steps end at 10, 20 (saved: 24), 34, 44 (48), 58, 68 (72), 82 s: then 18 s are left, 10 + 3 x 4 + 5 are reckoned with."""
    start = clock.now
    _, result = train("train.max_steps=20", "train.checkpoint_every=2", doctor=at_work(clock), deadline=Deadline(start + 100, clock=clock))
    assert (result.steps, result.ended, result.weights) == (7, "stopped at the deadline", "last")
    assert clock.now == start + 86 and Checkpoints(tmp_path / "run", keep=2).latest().name == "step_000007"
    [row] = rows(tmp_path / "run", "deadline")
    assert row == {
        "kind": "deadline",
        "step": 7,
        "seconds_left": 18.0,
        "step_seconds": 10.0,
        "validation_seconds": 0.0,
        "end_seconds": 17.0,
    }


def test_a_validation_that_does_not_fit_is_not_begun(train, clock):
    """The base's experts are counted until 6 s, step 7 ends at 76: of the 18 s left, step 8 and the margin take 14.7. Its validation was
    not measured yet and sees as many rows as a step, so it counts as one."""
    start = clock.now
    _, result = train("train.max_steps=20", "train.eval_every=8", doctor=at_work(clock), deadline=Deadline(start + 94, clock=clock))
    assert (result.steps, result.best_validation_loss) == (7, None)


def test_a_run_tells_its_deadline_the_bytes_of_a_checkpoint_and_how_long_a_validation_took(train, clock):
    asked = []

    class Asked(Deadline):
        def leaves_time(self, **following):
            asked.append(following)
            return super().leaves_time(**following)

    deadline = Asked(clock() + 1e6, clock=clock)
    model, _ = train("train.max_steps=3", "train.eval_every=2", doctor=at_work(clock), deadline=deadline)
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    due = (0, 1, 1)  # after step 2, and after the last
    assert asked == [{"checkpoint_bytes": 12 * adapter, "validation_steps": steps} for steps in due]
    assert deadline.reckon(checkpoint_bytes=0.0, validation_steps=1.0)["validation_seconds"] == VALIDATION


def test_a_run_that_its_deadline_ends_has_its_adapters_judged(train, clock, monkeypatch):
    judged = []
    monkeypatch.setattr(health.Liveness, "judge", lambda self: judged.append(self.steps))
    _, result = train("train.max_steps=20", doctor=at_work(clock), deadline=Deadline(clock() + 60, clock=clock))
    assert judged == [result.steps] and 0 < result.steps < health.EXPERT_STEPS


SETTINGS = "train.max_steps=12", "train.eval_every=4", "logging.every=5", "train.checkpoint_every=6", "train.schedule=cosine"


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_a_run_resumed_after_its_deadline_equals_one_without(train, clock, tmp_path):
    whole, _ = train(*SETTINGS, name="whole")
    start = clock.now
    _, cut = train(*SETTINGS, doctor=at_work(clock), deadline=Deadline(start + 110, clock=clock))
    assert cut.ended == "stopped at the deadline" and cut.steps not in (4, 5, 6, 8, 10, 12)
    resumed, result = train(*SETTINGS, resume=True)
    assert (result.steps, result.ended) == (12, "finished")
    for kind in ("train", "eval", "experts"):
        assert rows(tmp_path / "run", kind) == rows(tmp_path / "whole", kind) != []
    assert all(torch.equal(tensor, trained(resumed)[name]) for name, tensor in trained(whole).items())
    states = [json.loads((tmp_path / name / "checkpoints" / "step_000012" / "trainer.json").read_text()) for name in ("run", "whole")]
    assert states[0] == states[1]


def test_sigterm_ends_a_run_as_a_deadline_does(train, tmp_path):
    whole, _ = train(*SETTINGS, name="whole")
    handler = signal.getsignal(signal.SIGTERM)
    micro_batches = itertools.count(1)

    def terminated_in_step_3(model, inputs):
        if model.training and next(micro_batches) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    _, cut = train(*SETTINGS, doctor=lambda model: model.register_forward_pre_hook(terminated_in_step_3))
    assert (cut.steps, cut.ended) == (3, "stopped at the deadline") and signal.getsignal(signal.SIGTERM) == handler
    assert Checkpoints(tmp_path / "run", keep=2).latest().name == "step_000003"
    resumed, _ = train(*SETTINGS, resume=True)
    assert all(torch.equal(tensor, trained(resumed)[name]) for name, tensor in trained(whole).items())


def test_the_best_weights_are_kept_and_the_last_go_on(train, clock, tmp_path):
    start = clock.now
    _, result = train(*SETTINGS, doctor=at_work(clock), deadline=Deadline(start + 110, clock=clock))
    newest = Checkpoints(tmp_path / "run", keep=2).latest()
    assert result.weights == "best" and json.loads((newest / "trainer.json").read_text())["best_step"] == 4
    assert newest.name == f"step_{result.steps:06}"


def test_no_time_for_a_first_step_is_an_error(train, clock):
    deadline = Deadline(clock() + 100, clock=clock)
    clock.now += 99
    with pytest.raises(TrainingError, match=r"^train\.deadline: no time is left for a first step"):
        train("train.max_steps=2", deadline=deadline)


def test_a_resumed_run_without_time_for_a_step_leaves_what_it_found(train, clock, tmp_path):
    before, _ = train("train.max_steps=2")
    deadline = Deadline(clock() + 100, clock=clock)
    clock.now += 99
    after, result = train("train.max_steps=4", resume=True, deadline=deadline)
    assert (result.steps, result.ended, clock.now) == (2, "stopped at the deadline", deadline.at - 1)
    assert all(torch.equal(tensor, trained(after)[name]) for name, tensor in trained(before).items())


@pytest.mark.parametrize("is_ended", [True, False])
def test_what_fails_after_the_signal_says_so(clock, is_ended):
    with pytest.raises(RuntimeError, match="Connection closed by peer") as failed, Deadline(clock=clock).comes_with(signal.SIGTERM):
        if is_ended:
            os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")
    assert getattr(failed.value, "__notes__", []) == [AFTER_SIGNAL] * is_ended
