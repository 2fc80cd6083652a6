"""A function that keeps only its inputs for the backward and computes itself again there: for cheap steps with large results.

Activation checkpointing (`train/activation.py`) does so for whole blocks; this is for parts whose intermediate values no one should hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recomputed(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """`function(*inputs)`, which is a tensor or a tuple of them and Nones. It has to give the same each time it is called.

    In fp32 a plain call: there, on a CPU, time is short and not memory.
    """
    return function(*inputs) if inputs[0].dtype == torch.float32 else _Recomputed.apply(function, *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *inputs: Tensor) -> Any:
        ctx.function = function
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            outputs = ctx.function(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        used = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(torch.autograd.grad([o for o, _ in used], wanted, [g for _, g in used], allow_unused=True))
        return None, *(next(found) if need else None for need in needed)
