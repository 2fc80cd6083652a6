"""Every byte equals llama.cpp's own: `ggml_quantize_chunk` of the library inside xllamacpp's wheel."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotune.export.gguf.quants import KINDS, quantize

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.quantize import llama_cpp

pytest.importorskip("xllamacpp")
QUANTISED = [kind for kind, packing in KINDS.items() if packing.pack]
NUM_ROWS, LENGTH = 64, 1024


def differing(x: torch.Tensor, kind: str) -> int:
    """Blocks."""
    ours, theirs = quantize(x, kind, through=None), llama_cpp(x, kind)
    return int((ours != theirs).reshape(-1, KINDS[kind].num_bytes).any(1).sum())


def distributions() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_ROWS, LENGTH)
    normal = torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    sign = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
    column = torch.arange(LENGTH)
    exponent = torch.rand(shape, generator=generator)
    outlier = normal * 1e-3
    outlier[:, ::256] = 50 * sign[:, ::256]
    heavy = normal / torch.randn(shape, generator=generator).abs().clamp(min=1e-4)
    return {
        "normal": normal * 0.02, "uniform": uniform, "negative": -uniform, "bfloat16": normal.bfloat16().float(), "float16": (normal * 0.02).half().float(),
        "sparse": normal * (uniform < 0.05), "sparser": normal * (uniform < 0.004), "some blocks zero": normal * (column // 32 % 3 == 0),
        "constant rows": normal[:, :1].expand(shape), "constant blocks": normal[:, ::32].repeat_interleave(32, 1), "two values": sign, "zero": torch.zeros(shape),
        "minus zero": -torch.zeros(shape), "signed by block": normal.abs() * torch.where(column // 32 % 2 == 0, 1.0, -1.0), "ties": (normal * 4).round() / 4,
        "tiny": normal * 1e-30, "denormal": normal * 1e-42, "nearly denormal": normal * 1e-38, "below float16": normal * 1e-8, "at ggml's epsilon": normal * 1e-15,
        "huge": normal * 1e30, "largest": sign * 3e38 * uniform, "scale above float16": normal * 4e6, "scale at float16's end": normal * 4e5,
        "heavy tailed": heavy, "one outlier": outlier, "far from zero": normal * 1e-3 + 5, "far below zero": normal * 1e-4 - 5, "tiny steps": normal * 1e-6 - 1000,
        "all magnitudes": sign * 10 ** (exponent * 76 - 38), "magnitudes of float16": sign * 10 ** (exponent * 11 - 7), "ramp": (column / 7.0).expand(shape),
    }  # fmt: skip


@pytest.mark.parametrize("kind", QUANTISED)
def test_bytes_equal_llama_cpps_over_distributions(kind):
    found = {name: differing(x, kind) for name, x in distributions().items()}
    assert found == dict.fromkeys(found, 0)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_types_equal_llama_cpps(kind):
    for name in ("normal", "below float16", "denormal", "minus zero", "float16"):
        assert differing(distributions()[name], kind) == 0, name


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_two_step_path_through_float16_is_equal(kind, dtype):
    x = distributions()["magnitudes of float16"].to(dtype)
    assert np.array_equal(quantize(x, kind), llama_cpp(x.half(), kind))


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q5_1"])
def test_rows_that_are_multiples_of_32_alone(kind):
    """Nemotron-3-Nano's 2688 is one."""
    assert differing(torch.randn(3, 2688, generator=torch.Generator().manual_seed(1)), kind) == 0


@pytest.mark.parametrize("kind", QUANTISED)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_blocks_of_any_mixture_equal_llama_cpps(kind, data):
    """A super-block whose sub-blocks are drawn from different distributions, each scaled and moved."""
    pool = torch.cat(list(distributions().values()))
    chosen = data.draw(st.lists(st.integers(0, len(pool) * LENGTH // 16 - 1), min_size=64, max_size=64))
    magnitude = data.draw(st.sampled_from([1e-38, 1e-8, 1e-3, 1.0, 1e3]))
    offset = data.draw(st.sampled_from([0.0, 0.0, 1.0, -1.0, 1e3])) * magnitude
    x = (pool.view(-1, 16)[chosen].reshape(1, -1) * magnitude + offset).clamp(-3e38, 3e38)
    assert differing(x, kind) == 0
