"""8-bit AdamW against AdamW in fp32, and through a checkpoint. It compiles: about fifteen seconds on one core."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from nemotune.recipe import Train
from nemotune.train.checkpoint import Checkpoints, Progress
from nemotune.train.optim import make_optimizer
from nemotune.train.step import update

RATE = 1e-2
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler on a CPU"),
]


class Tuned:
    """A layer whose weight is large enough for 8-bit moments (4096 values and more) and whose bias is not."""

    def __init__(self, optimizer: str) -> None:
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(256, 64)
        self.parameters = dict(self.layer.named_parameters())
        self.optimizer = make_optimizer(self.parameters, Train(optimizer=optimizer, learning_rate=RATE, weight_decay=0.1))

    def step(self, number: int) -> dict[str, torch.Tensor]:
        """Take a step with gradients that depend on its number alone; returns what it added."""
        generator = torch.Generator().manual_seed(number)
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        for p in self.parameters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        update(self.parameters.values(), self.optimizer, learning_rate=RATE, grad_norm=1.0, max_grad_norm=0.0)
        return {name: p.detach() - before[name] for name, p in self.parameters.items()}


def test_8_bit_adamw_takes_the_steps_of_adamw(tmp_path):
    """The first step reads no 8-bit moment, so it is AdamW's. Later ones read moments with 64 levels a sign between a tenth of their
    block's largest value and the whole of it: an error of 0.9 / 64 / sqrt(12) = 0.4 % of the largest, which among 256 normal values
    is 2.8 of their root mean square: 1.1 % of a moment, 1.6 % of a step that divides one by the other. Four bits would make it 20 %."""
    pytest.importorskip("torchao", reason="adamw_8bit on a CPU is torchao's, which is not installed")
    plain, small = Tuned("adamw"), Tuned("adamw_8bit")
    for number in range(3):
        expected, got = plain.step(number), small.step(number)
        for name in expected:
            rounding = number == 0 or name == "bias"
            assert (got[name] - expected[name]).norm() < (1e-4 if rounding else 0.02) * expected[name].norm(), (number, name)
            assert number == 0 or name == "bias" or not torch.allclose(got[name], expected[name], atol=1e-3 * RATE), "moments of 8 bits"
    state = small.optimizer.state[small.parameters["weight"]]
    assert state["exp_avg"].codes.dtype == state["exp_avg_sq"].codes.dtype == torch.uint8

    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(small.layer, small.optimizer, Progress(step=3))
    resumed = Tuned("adamw_8bit")
    checkpoints.load(checkpoints.latest(), resumed.layer, resumed.optimizer)
    expected, got = small.step(3), resumed.step(3)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
