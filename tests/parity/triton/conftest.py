"""Triton's interpreter, in which the kernels run on the CPU, set right where its bf16 is not a GPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch


@pytest.fixture
def bf16_as_on_a_gpu(monkeypatch):
    """The interpreter cuts fp32 off to bf16 where a GPU rounds to nearest, and multiplies matrices of bf16 as the integers that it holds them as."""
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    bf16, fp32 = interpreter.tl.bfloat16, interpreter.tl.float32

    def rounded(values, source, target, mode):
        if (source, target) != (fp32, bf16):
            return convert(values, source, target, mode)
        return torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()

    def widened(builder, a, b, *rest):
        a, b = (
            interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), fp32) if t.dtype.scalar == bf16 else t
            for t in (a, b)
        )
        return dot(builder, a, b, *rest)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)
