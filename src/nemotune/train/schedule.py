"""The learning rate as a function of the step alone: warmup, then cosine, linear, constant or warmup-stable-decay."""

from __future__ import annotations

import math
from fractions import Fraction

from nemotune.recipe import Train

WSD_DECAY = 0.2  # share of the steps that a warmup-stable-decay schedule spends decaying (arXiv 2404.06395 uses 0.1 to 0.2)


def learning_rate(step: int, total_steps: int, train: Train) -> float:
    """The rate of step `step`, counted from 0. Warmup rises as (step + 1) / warmup steps, so the first step already moves."""
    warmup = warmup_steps(total_steps, train)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * _shape(progress, train.schedule)


def warmup_steps(total_steps: int, train: Train) -> int:
    """`train.warmup_steps`, else `warmup_ratio` of all steps."""
    return train.warmup_steps if train.warmup_steps is not None else part_of(total_steps, train.warmup_ratio)


def part_of(steps: int, share: float) -> int:
    """`share` of `steps`, rounded up, of the decimal number that was written: 0.07 of 100 is 7.

    transformers rounds up too, but the product of floats, 7.000000000000001, and so warms up over 8.
    """
    return math.ceil(Fraction(str(share)) * steps)


def _shape(progress: float, schedule: str) -> float:
    """From 1 at progress 0 towards 0 at progress 1."""
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - progress
    if schedule == "wsd":
        return min(1.0, (1 - progress) / WSD_DECAY)
    return 0.5 * (1 + math.cos(math.pi * progress))
