"""The learning rate as a function of the step alone: warmup, then cosine, linear, constant or warmup-stable-decay (arXiv 2404.06395).

After warmup the rates are those of megatron-core's `OptimizerParamScheduler`; its warmup is a step behind, since its first step has rate 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from nemotune.recipe import Train

# From 1 where the decay begins, at 0, to 0 where it ends, at 1.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "exponential": lambda progress: 2 * 0.5**progress - 1,
    "minus_sqrt": lambda progress: 1 - math.sqrt(progress),
}


def learning_rate(step: int, total_steps: int, train: Train) -> float:
    """The rate of step `step`, counted from 0. Warmup rises as (step + 1) / warmup steps, so the first step already moves."""
    warmup = warmup_steps(total_steps, train)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    if train.schedule == "constant":
        return train.learning_rate
    is_wsd = train.schedule == "wsd"
    begin = max(warmup, total_steps - part_of(total_steps, train.decay_ratio)) if is_wsd else warmup
    progress = max(step - begin, 0) / max(total_steps - begin, 1)
    left = DECAYS[train.decay_style if is_wsd else train.schedule](progress)
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * left


def warmup_steps(total_steps: int, train: Train) -> int:
    """`train.warmup_steps`, else `warmup_ratio` of all steps."""
    return train.warmup_steps if train.warmup_steps is not None else part_of(total_steps, train.warmup_ratio)


def part_of(steps: int, share: float) -> int:
    """`share` of `steps`, rounded up, of the decimal number that was written: 0.07 of 100 is 7.

    transformers rounds up too, but the product of floats, 7.000000000000001, and so warms up over 8.
    """
    return math.ceil(Fraction(str(share)) * steps)
