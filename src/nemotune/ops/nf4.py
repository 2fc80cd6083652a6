"""NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3): four bits a weight, a scale per 64, in the layout of bitsandbytes.

A weight is an index into sixteen quantiles of the normal distribution times its block's largest magnitude; those magnitudes, less their
mean, are themselves eight-bit floats (arXiv 2110.02861) with a scale per 256. Together 4.13 bits a weight. `quantize` is for frozen
weights: `nf4_linear` gives the gradient of its input and saves no weight in any wider form.

Shapes: O out, I in, n = O * I weights of one matrix. Experts are matrices of their own, stacked along dim 0 of every field.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotune.ops.grouped import frozen_grouped_linear

BLOCK, SCALE_BLOCK = 64, 256
CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
AT_ONCE = {True: 2**26, False: 2**18}  # weights dequantised in one go: what is in between stays at 403 MB on CUDA, in the CPU's cache


class NF4(NamedTuple):
    """One quantised matrix, or E of them stacked.

    `codes` [n / 2] uint8, two weights a byte, the first in the high half; `absmax` [n / 64] uint8; `scales` [n / 64 / 256] and `offset` [] fp32.
    """

    codes: Tensor
    absmax: Tensor
    scales: Tensor
    offset: Tensor

    def at(self, index: int) -> NF4:
        """Matrix `index` of a stack."""
        return NF4(*(field[index] for field in self))


def empty(shape: tuple[int, ...], *, device: torch.device | str | None = None) -> NF4:
    """Room for a matrix [O, I] or a stack [E, O, I]. Raises ValueError where 64 does not divide O * I."""
    *stack, out_features, in_features = shape
    n = out_features * in_features
    if n % BLOCK:
        raise ValueError(f"NF4 needs a multiple of {BLOCK} weights; got {out_features} x {in_features}")
    num_blocks = n // BLOCK
    return NF4(
        torch.empty(*stack, n // 2, dtype=torch.uint8, device=device),
        torch.empty(*stack, num_blocks, dtype=torch.uint8, device=device),
        torch.empty(*stack, -(-num_blocks // SCALE_BLOCK), device=device),
        torch.empty(tuple(stack), device=device),
    )


def quantize(weight_OI: Tensor) -> NF4:
    """The nearest NF4 of a matrix. Raises ValueError where 64 does not divide its size."""
    if weight_OI.numel() % BLOCK:
        raise ValueError(f"NF4 needs a multiple of {BLOCK} weights; got {tuple(weight_OI.shape)}")
    blocks = weight_OI.reshape(-1, BLOCK).float()
    absmax = blocks.abs().amax(-1)
    # the reciprocal first, as bitsandbytes does: a division rounds otherwise at the borders between codes
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(-1)
    codes = torch.bucketize(scaled.clamp(-1, 1).flatten(), _borders(_codebook(weight_OI.device)), out_int32=True).to(torch.uint8)
    offset = absmax.mean()
    absmax_codes, scales = _quantize_scales(absmax - offset)
    return NF4((codes[::2] << 4) | codes[1::2], absmax_codes, scales, offset)


def dequantize(quantized: NF4, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The matrix [O, I], or the stack [E, O, I], in `dtype`: fp32 products, rounded once."""
    codes, absmax = quantized.codes, block_absmax(quantized).flatten()
    pairs = _pairs(codes.device)
    weight = torch.empty(codes.numel() // (BLOCK // 2), BLOCK, dtype=dtype, device=codes.device)
    rows = AT_ONCE[codes.is_cuda] // BLOCK
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        values = pairs.index_select(0, codes.view(-1, BLOCK // 2)[part].flatten().int()).view(torch.float32).view(-1, BLOCK)
        weight[part] = values.mul_(absmax[part].unsqueeze(-1))
    return weight.view(shape)


def block_absmax(quantized: NF4) -> Tensor:
    """The largest magnitude of each block of 64, fp32 [..., n / 64]."""
    values = dynamic_codebook(quantized.absmax.device)[quantized.absmax.int()]
    scales = quantized.scales.repeat_interleave(SCALE_BLOCK, dim=-1)[..., : values.shape[-1]]
    return values * scales + quantized.offset.unsqueeze(-1)


def nf4_linear(x: Tensor, quantized: NF4, shape: tuple[int, int]) -> Tensor:
    """`x @ W.T` [..., O] in the dtype of x; its backward dequantises anew."""
    return _NF4Linear.apply(x, shape, *quantized)  # type: ignore[no-any-return]


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, int], *fields: Tensor) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(*fields)
        return F.linear(x, dequantize(NF4(*fields), shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return grad @ dequantize(NF4(*ctx.saved_tensors), ctx.shape, grad.dtype), None, None, None, None, None


def nf4_grouped_linear(x_MI: Tensor, quantized: NF4, shape: tuple[int, int, int], ends_E: Tensor) -> Tensor:
    """`grouped_linear` over a quantised stack [E, O, I]: [M, O] in the dtype of x; its backward dequantises anew."""
    return frozen_grouped_linear(x_MI, ends_E, partial(reached, quantized, shape))


def reached(quantized: NF4, shape: tuple[int, int, int], rows_M: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices of the experts that have rows, and where those end. On CUDA all of them, unless most cannot have any: asking is a sync."""
    if rows_M.is_cuda and len(rows_M) >= shape[0]:
        return dequantize(quantized, shape, rows_M.dtype), ends_E
    used = ends_E.diff(prepend=ends_E.new_zeros(1)).nonzero().squeeze(1)
    if len(used) == shape[0]:
        return dequantize(quantized, shape, rows_M.dtype), ends_E
    return dequantize(NF4(*(field[used] for field in quantized)), (len(used), *shape[1:]), rows_M.dtype), ends_E[used]


def _quantize_scales(values: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic eight-bit codes of `values` and the scale of each 256 of them."""
    blocks = F.pad(values, (0, -len(values) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    scales = blocks.abs().amax(-1)
    scaled = blocks * (1.0 / scales.clamp(min=1e-38)).unsqueeze(-1)
    codes = torch.bucketize(scaled.clamp(-1, 1).flatten(), _borders(dynamic_codebook(values.device)), out_int32=True).to(torch.uint8)
    return codes[: len(values)], scales


@cache
def _codebook(device: torch.device) -> Tensor:
    return torch.tensor(CODEBOOK, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two fp32 values of every byte as one int64, [256]: looked up together, more than twice as fast as a row of two."""
    values = _codebook(device)
    return torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=-1).view(torch.int64).flatten()


@cache
def dynamic_codebook(device: torch.device) -> Tensor:
    """The 256 values of the signed eight-bit dynamic float: a decimal exponent in unary, what is left as a linear fraction (arXiv 2110.02861)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        borders = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        magnitudes = 10.0 ** (exponent - 6) * (borders[:-1] + borders[1:]) / 2
        values += [*magnitudes.tolist(), *(-magnitudes).tolist()]
    return torch.tensor(sorted(values), device=device)


def _borders(codebook: Tensor) -> Tensor:
    """The values at which the nearest entry changes."""
    return (codebook[:-1] + codebook[1:]) / 2
