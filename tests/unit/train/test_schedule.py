"""The rates of every schedule, against formulas: those of megatron-core's `OptimizerParamScheduler` once warmup is over."""

from __future__ import annotations

import math

import pytest

from nemotune.errors import RecipeError
from nemotune.recipe import Train, load
from nemotune.train.schedule import DECAYS, learning_rate, warmup_steps

HIGH, LOW = 1.6e-3, 1.6e-5
LEFT = {
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: math.cos(math.pi * r / 2) ** 2,
    "exponential": lambda r: 2.0 ** (1 - r) - 1.0,
    "minus_sqrt": lambda r: 1.0 - r**0.5,
}


def rates(total, **settings):
    train = Train(learning_rate=HIGH, min_learning_rate=LOW, **settings)
    return [learning_rate(step, total, train) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("total, warmup", [(110, 10), (97, 0), (1000, 333)])
def test_cosine_and_line_fall_from_the_end_of_warmup_to_the_end_of_the_run(schedule, total, warmup):
    found = rates(total, schedule=schedule, warmup_steps=warmup)
    for step, rate in enumerate(found):
        expected = HIGH * (step + 1) / warmup if step < warmup else LOW + (HIGH - LOW) * LEFT[schedule]((step - warmup) / (total - warmup))
        assert rate == pytest.approx(expected, rel=1e-12), step


@pytest.mark.parametrize("style", list(DECAYS))
@pytest.mark.parametrize("total, ratio, decay", [(110, 0.2, 22), (97, 0.13, 13), (40, 0.07, 3), (20, 0.7, 14)])
def test_wsd_stays_and_then_falls_over_the_last_steps(style, total, ratio, decay):
    found = rates(total, schedule="wsd", decay_style=style, decay_ratio=ratio, warmup_steps=4)
    begin = total - decay
    assert found[3 : begin + 1] == [HIGH] * (begin - 2)
    for step in range(begin, total):
        assert found[step] == pytest.approx(LOW + (HIGH - LOW) * LEFT[style]((step - begin) / decay), rel=1e-12), step
    assert all(later < earlier for earlier, later in zip(found[begin:], found[begin + 1 :], strict=False)) and found[-1] > LOW


def test_decay_begins_when_warmup_is_over_at_the_soonest():
    found = rates(10, schedule="wsd", decay_ratio=0.9, warmup_steps=4)
    assert found[:5] == [pytest.approx(HIGH * part) for part in (0.25, 0.5, 0.75, 1, 1)]
    assert found[5:] == [pytest.approx(LOW + (HIGH - LOW) * (1 - step / 6)) for step in range(1, 6)]


def test_constant_stays():
    assert rates(20, schedule="constant", warmup_steps=2) == [HIGH / 2, *[HIGH] * 19]


def test_no_warmup_starts_at_the_full_rate():
    assert learning_rate(0, 10, Train(learning_rate=0.5, warmup_ratio=0.0)) == 0.5


@pytest.mark.parametrize("ratio, total, steps", [(0.07, 100, 7), (0.03, 100, 3), (0.03, 110, 4), (1e-5, 100, 1), (0, 100, 0)])
def test_warmup_is_the_share_as_it_is_written_rounded_up(ratio, total, steps):
    assert warmup_steps(total, Train(warmup_ratio=ratio)) == steps


@pytest.mark.parametrize(
    "setting, told",
    [
        ("train.min_learning_rate=0.1", r"train.min_learning_rate: got 0.1, expected at most train.learning_rate \(0.002\)"),
        ("train.decay_ratio=1.1", r"train.decay_ratio: got 1.1, expected a number from 0 to 1"),
        ("train.decay_style=sqrt", r"train.decay_style: got 'sqrt', expected linear, cosine, exponential or minus_sqrt"),
    ],
)  # fmt: skip
def test_rates_that_do_not_fall_are_refused_by_key(setting, told):
    with pytest.raises(RecipeError, match=told):
        load("quickstart", [setting, "train.learning_rate=0.002"])
