"""Which implementation computes where: Triton's kernels on a GPU if they run there, and every reason told if not."""

from __future__ import annotations

import sys

import pytest
import torch

from nemotune.errors import NemotuneError
from nemotune.ops import conv, ssd
from nemotune.ops.documents import Documents
from nemotune.ops.kernels import Kernels, kernels, uses_triton, why_not_triton

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU on which Triton runs, nothing having been chosen yet."""
    triton_conv = pytest.importorskip("nemotune.ops.triton_conv", reason="needs Triton", exc_type=ImportError)
    monkeypatch.delenv("NEMOTUNE_KERNELS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(triton_conv, "try_on", lambda device: None)
    why_not_triton.cache_clear()
    yield triton_conv
    why_not_triton.cache_clear()


def test_on_a_cpu_pytorch_computes():
    chosen = kernels(torch.device("cpu"), torch.bfloat16, 128)
    assert str(chosen) == "kernels: ssd=torch conv=torch experts=per_expert attention=per_document loss=chunked"
    assert not uses_triton(torch.device("cpu"))


def test_on_a_gpu_triton_computes_where_a_trial_works(gpu):
    assert uses_triton(GPU) and why_not_triton(GPU) is None


def test_a_trial_that_fails_is_told_and_not_repeated(gpu, monkeypatch):
    tried = []

    def fails(device):
        tried.append(device)
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(gpu, "try_on", fails)
    assert not uses_triton(GPU) and not uses_triton(GPU) and tried == [GPU]
    told = str(Kernels("torch", "torch", "grouped_mm", "varlen", "chunked", why_not_triton(GPU)))
    assert told == "kernels: ssd=torch conv=torch experts=grouped_mm attention=varlen loss=chunked (triton: Failed to find C compiler.)"


def test_a_machine_without_triton_is_told(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "nemotune.ops.triton_conv")
    monkeypatch.delattr("nemotune.ops.triton_conv")
    assert why_not_triton(GPU).startswith("triton: ") and "triton" in why_not_triton(GPU)[len("triton: ") :]


def test_an_older_gpu_is_told(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert why_not_triton(GPU) == "triton: the GPU is older than Ampere"


def test_the_variable_forces_pytorch(gpu, monkeypatch):
    monkeypatch.setenv("NEMOTUNE_KERNELS", "torch")
    assert not uses_triton(GPU) and why_not_triton(GPU) == "NEMOTUNE_KERNELS=torch"


def test_another_value_of_the_variable_is_an_error(gpu, monkeypatch):
    monkeypatch.setenv("NEMOTUNE_KERNELS", "tirton")
    with pytest.raises(NemotuneError, match="NEMOTUNE_KERNELS: got 'tirton', expected 'torch' or nothing"):
        uses_triton(GPU)


def test_the_ops_hand_everything_to_triton_where_it_computes(gpu, monkeypatch):
    from nemotune.ops import triton_ssd

    documents = Documents(torch.tensor([0, 3], dtype=torch.int32))
    x, dt, A, B, C, D, bias = (torch.randn(shape) for shape in ((3, 2, 4), (3, 2), (2,), (3, 1, 5), (3, 1, 5), (2,), (4,)))
    monkeypatch.setattr(conv, "uses_triton", lambda device: True)
    monkeypatch.setattr(ssd, "uses_triton", lambda device: True)
    monkeypatch.setattr(gpu, "causal_conv1d", lambda *args: args)
    monkeypatch.setattr(triton_ssd, "ssd", lambda *args, **options: (args, options))
    given = x.flatten(1), dt, bias, documents
    assert all(got is one for got, one in zip(conv.causal_conv1d(*given), given, strict=True))
    args, options = ssd.ssd(x, dt, A, B, C, D, documents, chunk_size=7, final_states=True)
    assert all(got is one for got, one in zip(args, (x, dt, A, B, C, D, documents), strict=True))
    assert options == {"chunk_size": 7, "final_states": True}
