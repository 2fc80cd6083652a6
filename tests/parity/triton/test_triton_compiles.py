"""Every kernel compiles ahead of time, as the models call it, to machine code that a GPU's shared memory has room for. No GPU is needed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")]

# Calls the ops on CPU tensors with launching replaced by compiling; what they compute is never looked at.
COMPILE = """
import inspect, json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type
from nemotune.ops import triton_conv, triton_ssd
from nemotune.ops.documents import Documents

capability, dtype, P, S = int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
shared = {}

def compile(kernel, *args, grid, warmup, num_warps=4, num_stages=3, **constants):
    bound = inspect.signature(kernel.fn).bind(*args, **constants).arguments
    constants |= {name: None for name, value in bound.items() if value is None}
    signature = {name: "constexpr" if name in constants else mangle_type(value) for name, value in bound.items()}
    whole = lambda value: (value.data_ptr() if torch.is_tensor(value) else value) % 16 == 0
    attrs = {(i,): [["tt.divisibility", 16]] for i, (name, value) in enumerate(bound.items()) if name not in constants and whole(value)}
    options, target = dict(num_warps=num_warps, num_stages=num_stages), GPUTarget("cuda", capability, 32)
    built = triton.compile(ASTSource(kernel, signature, constants, attrs), target=target, options=options)
    assert built.asm["cubin"]
    shared[kernel.fn.__name__] = max(built.metadata.shared, shared.get(kernel.fn.__name__, 0))

JITFunction.run = compile
documents = Documents(torch.tensor([0, 300, 512], dtype=torch.int32))
N, G = 16, 2
width = N * P + 2 * G * S
row = torch.zeros(512, N * P + width + N, dtype=dtype, requires_grad=True)
for trained in (False, True):
    weight, bias = torch.zeros(width, 4, requires_grad=trained), torch.zeros(width, requires_grad=True) if trained else None
    xBC = triton_conv.causal_conv1d(row[:, N * P : -N], weight, bias, documents)
    x, B, C = xBC.split([N * P, G * S, G * S], dim=-1)
    x, B, C = x.unflatten(-1, (N, P)), B.unflatten(-1, (G, S)), C.unflatten(-1, (G, S))
    dt, A, D = torch.zeros(512, N), torch.zeros(N), torch.zeros(N)
    y, states = triton_ssd.ssd(x, dt, A, B, C, D, documents, chunk_size=128, final_states=trained)
    (y.sum() + (states.sum() if trained else 0)).backward()
print(json.dumps(shared))
"""

KERNELS = {
    "_forward", "_backward", "_chunk_states", "_pass_states", "_outputs",
    "_chunk_state_gradients", "_row_gradients", "_column_gradients", "_decay_gradients",
}  # fmt: skip


@pytest.mark.parametrize(
    "capability, dtype, head_dim, state", [(90, "bfloat16", 64, 128), (90, "float32", 64, 128), (80, "bfloat16", 80, 128)]
)
def test_every_kernel_compiles_and_fits(capability, dtype, head_dim, state):
    """Of Nemotron 3 on an H100, of Nemotron Nano 2 on an A100; 99 KB is what the least of the GPUs since has for a block."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, *map(str, (capability, dtype, head_dim, state))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout.splitlines()[-1])
    assert set(shared) == KERNELS
    assert max(shared.values()) <= 99 * 1024, shared
