"""Which implementation of each op computes on a device: chosen once, told in one line when a run starts.

On a GPU the scan and the convolution are Triton's kernels wherever a trial of one works (Triton compiles its launcher: it needs a C
compiler), else PyTorch's, slower and told with the reason. `NEMOTUNE_KERNELS=torch` forces PyTorch's. Attention chooses by the queries
that it gets (`attention.has_flash`); the loss has one implementation.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch

from nemotune.errors import UnsupportedError
from nemotune.ops.attention import has_flash

VARIABLE = "NEMOTUNE_KERNELS"


@dataclass(frozen=True)
class Kernels:
    """The implementation of each op, and why Triton's are not used on a GPU."""

    ssd: str
    conv: str
    experts: str
    attention: str
    loss: str
    why: str | None = None

    def __str__(self) -> str:
        ops = " ".join(f"{op}={getattr(self, op)}" for op in ("ssd", "conv", "experts", "attention", "loss"))
        return f"kernels: {ops} ({self.why})" if self.why else f"kernels: {ops}"


def kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernels:
    """Those of a model that computes in `dtype` and attends with heads of `head_dim`."""
    scan = "triton" if uses_triton(device) else "torch"
    flash = has_flash(torch.empty(0, 1, head_dim, dtype=dtype, device=device))
    why = why_not_triton(device) if device.type == "cuda" else None
    return Kernels(
        scan, scan, "per_expert" if device.type == "cpu" else "grouped_mm", "varlen" if flash else "per_document", "chunked", why
    )


def uses_triton(device: torch.device) -> bool:
    """Whether the scan and the convolution are Triton's there."""
    return device.type == "cuda" and why_not_triton(device) is None


@cache
def why_not_triton(device: torch.device) -> str | None:
    """None if Triton's kernels run on this GPU, else the reason. Raises UnsupportedError for a value of the variable that is unknown."""
    asked = os.environ.get(VARIABLE)
    if asked not in (None, "", "torch"):
        raise UnsupportedError(f"{VARIABLE}: got {asked!r}, expected 'torch' or nothing; unset it, and Triton is used where it runs")
    if asked:
        return f"{VARIABLE}={asked}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "triton: the GPU is older than Ampere"
    try:
        from nemotune.ops.triton_conv import try_on

        try_on(device)
    except Exception as error:  # whatever Triton lacks, from itself to a compiler: its exceptions have no common base
        return f"triton: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
    return None
