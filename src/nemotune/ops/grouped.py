"""One matrix product per expert over rows sorted by expert, as a single operation: `x @ weight[e].T` where expert e's rows lie.

Which rows go where is `experts.py`; weights in four bits are `nf4.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 32


def grouped_linear(x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`x @ weight[e].T` for the rows of each expert e, which end at `ends_E[e]`: [M, O] in the dtype of x.

    Rows of memory have to be multiples of 16 bytes long: a LoRA of rank 4 is padded with zeros.
    """
    out_features, multiple = weight_EOI.shape[1], 16 // x_MI.element_size()
    short_in, short_out = -x_MI.shape[1] % multiple, -out_features % multiple
    weight_EOI = weight_EOI.to(x_MI.dtype)
    if short_in:
        x_MI = F.pad(x_MI, (0, short_in))
    if short_in or short_out:
        weight_EOI = F.pad(weight_EOI, (0, short_in, 0, short_out))
    y_MO = _GroupedLinear.apply(x_MI, weight_EOI, ends_E)
    return y_MO[:, :out_features] if short_out else y_MO


def grouped_product(x_MI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """`x @ weight[e]` for the rows of each expert: one kernel on CUDA, one product for each expert with rows on the CPU.

    There, in 16 bits, the rows are rounded up to `ROWS_AT_ONCE`, and the next expert writes over what is too much: oneDNN compiles a
    kernel for every number of rows that it meets, and keeps it (0.5 MB each).
    """
    if x_MI.device.type != "cpu":
        return F.grouped_mm(x_MI, weight_EIO, offs=ends_E)
    y_MO, step = x_MI.new_empty(len(x_MI), weight_EIO.shape[-1]), 1 if x_MI.dtype == torch.float32 else ROWS_AT_ONCE
    start = 0
    for weight_IO, end in zip(weight_EIO, ends_E.tolist(), strict=True):
        if end > start:
            rows = slice(start, start + -(-(end - start) // step) * step)
            y_MO[rows] = x_MI[rows] @ weight_IO
        start = end
    return y_MO


class _GroupedLinear(torch.autograd.Function):
    """A frozen weight saves no input."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_MI if ctx.needs_input_grad[1] else None, weight_EOI, ends_E)
        return grouped_product(x_MI, weight_EOI.transpose(-1, -2), ends_E)

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x_MI, weight_EOI, ends_E = ctx.saved_tensors
        grad_MO = grad_MO.contiguous()
        grad_x = grouped_product(grad_MO, weight_EOI, ends_E) if ctx.needs_input_grad[0] else None
        if x_MI is None:
            return grad_x, None, None
        grad_weight = F.grouped_mm(grad_MO.T, x_MI, offs=ends_E)
        empty_E = ends_E == F.pad(ends_E[:-1], (1, 0))  # Blackwell's kernel leaves what was there (pytorch issue 172439)
        return grad_x, grad_weight.masked_fill_(empty_E[:, None, None], 0), None


def frozen_grouped_linear(x_MI: Tensor, ends_E: Tensor, weights: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """`grouped_linear` over frozen weights that are asked for where they are used, in the forward and again in the backward: none is kept.

    `weights(rows, ends)` gives [E, O, I] in the dtype of the rows, and where the rows of each of them end.
    """
    return _FrozenGroupedLinear.apply(x_MI, ends_E, weights)  # type: ignore[no-any-return]


class _FrozenGroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, ends_E: Tensor, weights: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        ctx.weights = weights
        ctx.save_for_backward(ends_E)
        return grouped_linear(x_MI, *weights(x_MI, ends_E))

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        weight_EOI, ends_E = ctx.weights(grad_MO, *ctx.saved_tensors)
        return grouped_linear(grad_MO.contiguous(), weight_EOI.transpose(1, 2), ends_E), None, None
