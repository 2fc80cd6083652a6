"""What memory a run holds: the most so far, and on the CPU the return of what it has freed. It is no accountant: `plan` counts ahead."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch

GIVE_BACK_EVERY = 4  # steps: paging the memory in again costs 2 % of a step


def peak_memory_bytes() -> int:
    """The most memory that the process held: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":  # where ru_maxrss begins with the size of the process that started this one
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back_freed(steps_done: int) -> None:
    """Before the first step, and every few steps later, hand the system the pages that hold nothing but freed blocks.

    glibc keeps them, scattered, and grows beside them. Without a word where the C library has no `malloc_trim`.
    """
    if steps_done % GIVE_BACK_EVERY == 0 and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
