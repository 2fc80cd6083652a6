"""NF4 against bitsandbytes: the same bytes, read back to the same values."""

from __future__ import annotations

import pytest
import torch

from nemotune.ops import nf4

bitsandbytes = pytest.importorskip("bitsandbytes.functional")


def weights(kind: str, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(300, 1024, generator=generator)
    if kind == "uneven":
        weight *= torch.rand(300, 1, generator=generator) ** 8
    if kind == "sparse":
        weight *= torch.rand(300, 1024, generator=generator) < 0.01
    return (weight * 0.05).to(dtype)


CASES = [(kind, dtype) for kind in ("normal", "uneven", "sparse") for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_codes_scales_and_offset_are_those_of_bitsandbytes(kind, dtype):
    weight = weights(kind, dtype)
    codes, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantize(weight)
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(nf4.dynamic_codebook(weight.device), state.state2.code)
    assert torch.equal(ours.scales, state.state2.absmax) and torch.equal(ours.offset, state.offset)


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_eight_bit_magnitudes_are_the_nearest_where_its_cpu_kernel_looks_them_up(kind, dtype):
    """bitsandbytes' CPU kernel finds the code in a table of 2^16 entries and misses the nearest by that much; its other kernels do not."""
    weight = weights(kind, dtype)
    _, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    absmax = weight.float().reshape(-1, 64).abs().amax(-1)
    ours = nf4.quantize(weight)
    theirs = ours._replace(absmax=state.absmax.flatten())
    assert (ours.absmax.int() - theirs.absmax.int()).abs().max() <= 1
    distance, their_distance = ((nf4.block_absmax(q) - absmax).abs() for q in (ours, theirs))
    assert torch.all(distance <= their_distance + 1e-7)
    reciprocal = (1.0 / ours.scales).repeat_interleave(256)[: len(absmax)]
    exact = ((absmax - absmax.mean()) * reciprocal).unsqueeze(-1) - state.state2.code
    assert torch.equal(ours.absmax.long(), exact.abs().argmin(-1))  # the rule of its kernel without a table


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_its_bytes_are_read_back_to_its_values(kind, dtype):
    weight = weights(kind, dtype)
    codes, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    theirs = nf4.NF4(codes.flatten(), state.absmax.flatten(), state.state2.absmax, state.offset)
    assert torch.equal(nf4.dequantize(theirs, tuple(weight.shape), dtype), bitsandbytes.dequantize_4bit(codes, state))


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_linear_layers_dequantise_to_its_values(kind, dtype):
    """Bit for bit in every block whose magnitude its CPU table does not miss: all but one in a hundred."""
    weight = weights(kind, dtype)
    codes, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantize(weight)
    same = ours.absmax == state.absmax.flatten()
    blocks, their_blocks = (
        values.reshape(-1, 64) for values in (nf4.dequantize(ours, tuple(weight.shape), dtype), bitsandbytes.dequantize_4bit(codes, state))
    )
    assert torch.equal(blocks[same], their_blocks[same]) and same.float().mean() > 0.99
