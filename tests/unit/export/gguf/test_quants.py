import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from nemotune.errors import CheckpointError
from nemotune.export.gguf.quants import KINDS, arithmetic, block_bytes, quantize, row_bytes

QUANTISED = [kind for kind, packing in KINDS.items() if packing.pack]


def rows(num_rows: int = 3, length: int = 512, scale: float = 0.02, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, length, generator=torch.Generator().manual_seed(seed)) * scale


def dequantized(packed: np.ndarray, kind: str) -> torch.Tensor:
    return torch.from_numpy(quants.dequantize(packed, GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_bytes_that_the_gguf_package_expects(kind):
    assert (
        quantize(rows(), kind).shape == quants.quant_shape_to_byte_shape((3, 512), GGMLQuantizationType[kind]) == (3, row_bytes(kind, 512))
    )
    assert quants.quant_shape_from_byte_shape((3, block_bytes(kind)), GGMLQuantizationType[kind]) == (3, KINDS[kind].block)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("scale", [1e-40, 0.02, 1.0, 300.0])
def test_bytes_equal_the_gguf_packages(kind, scale):
    x = rows(scale=scale)
    with np.errstate(all="ignore"):
        assert np.array_equal(quantize(x, kind, through=None), quants.quantize(x.numpy(), GGMLQuantizationType[kind]).view(np.uint8))


def test_halves_round_away_from_zero_and_what_is_just_below_does_not():
    x = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -2.5, 0.49999997, -0.49999997, 1.4999999, 126.49999] + [0.0] * 22)
    packed = quantize(x[None], "Q8_0", through=None)
    assert packed[0, 2:12].view(np.int8).tolist() == [127, 1, 2, 3, -1, -3, 0, 0, 1, 126]


@pytest.mark.parametrize(("kind", "width", "levels"), [("Q4_K", 32, 15), ("Q5_K", 32, 31), ("Q6_K", 16, 63)])
def test_a_value_comes_back_within_a_level(kind, width, levels):
    """One level of the widest sub-block, as the search may cut a sub-block's ends, and the half 63rd (128th) to which scales and minima are rounded."""
    x = rows(64, 256).half().float()
    error = (dequantized(quantize(x, kind), kind) - x).abs().amax(1)
    span = (x.view(64, -1, width).amax(2).clamp(min=0) - x.view(64, -1, width).amin(2).clamp(max=0)).amax(1)
    if kind == "Q6_K":
        span = 2 * x.abs().amax(1)
    assert (error <= span / levels + 2 * span / 126).all()


@pytest.mark.parametrize(
    ("kind", "digest"),
    [("Q4_K", "8acefa98117c14b2"), ("Q5_K", "ee3653f4f441862d"), ("Q6_K", "b2350d0996884253"), ("Q8_0", "a435e234b2685bc4"), ("Q5_0", "bbfaf37a8b72b793"), ("Q5_1", "b26f8118e824cd61")],
)  # fmt: skip
def test_bytes_are_those_that_llama_cpp_gave(kind, digest):
    """Of whole numbers that any machine makes alike; tests/parity compares far more, with llama.cpp itself."""
    i = torch.arange(8 * 2048)
    x = (((i * i * 7919 + i * 104729) % 4001 - 2000).float() / 2048).view(8, 2048)
    assert hashlib.sha256(quantize(x, kind).tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("kind", QUANTISED)
def test_bfloat16_rows_are_rounded_to_float16_first(kind):
    x = rows(scale=1e-5).bfloat16()  # many are float16's subnormal numbers
    assert np.array_equal(quantize(x, kind), quantize(x.half(), kind, through=None))
    assert not np.array_equal(quantize(x, kind), quantize(x, kind, through=None))


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_packed_alone(kind):
    """Whatever chunk it falls in, and beside blocks that take the exact path."""
    x = torch.cat([rows(260, 1024), torch.zeros(2, 1024), rows(2, 1024, scale=1e-6), torch.full((2, 1024), -3.0)])
    alone = np.concatenate([quantize(row, kind) for row in x.split([1, 258, 1, 4, 2])])
    assert np.array_equal(quantize(x, kind), alone)


def test_stacked_experts_are_rows_too():
    x = rows(6, 256)
    assert np.array_equal(quantize(x.view(2, 3, 256), "Q4_K"), quantize(x, "Q4_K").reshape(2, 3, 144))


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0"])
def test_threads_do_not_disturb_each_other(kind):
    parts = [rows(8, 1024, seed=seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda x: quantize(x, kind), parts))
    assert all(np.array_equal(quantize(x, kind), packed) for x, packed in zip(parts, together, strict=True))


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_sums_are_the_same_where_einsum_would_fuse(kind, monkeypatch):
    x = rows(16, 1024)
    expected = quantize(x, kind)
    monkeypatch.setattr(arithmetic, "_einsum_rounds_products", lambda: False)
    assert np.array_equal(quantize(x, kind), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(kind, value):
    x = rows()
    x[1, 5] = value
    with pytest.raises(CheckpointError, match="1 of 1536 values are not finite"):
        quantize(x, kind)


def test_what_float16_cannot_hold_is_refused_and_can_be_kept():
    x = rows()
    x[0, 0] = 1e5
    with pytest.raises(CheckpointError, match="not finite as torch.float16"):
        quantize(x, "Q4_K")
    assert np.isfinite(dequantized(quantize(x, "Q8_0", through=None), "Q8_0")).all()


def test_a_row_that_is_no_multiple_of_the_block_is_refused():
    with pytest.raises(ValueError, match="Q4_K packs blocks of 256 values; a row of 288"):
        row_bytes("Q4_K", 288)
    assert quantize(rows(2, 288), "Q5_0").shape == (2, 9 * 22)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_are_no_bytes(kind):
    assert quantize(torch.empty(0, 256), kind).shape == (0, row_bytes(kind, 256))
