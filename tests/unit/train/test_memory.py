"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A process of its own, whose heap has no holes from before.
PROGRAM = """
import resource
from pathlib import Path
import torch
from nemotune.train.memory import GIVE_BACK_EVERY, give_back_freed

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

large, small = [], []
for _ in range(1000):
    large.append(torch.ones(25_000))  # 100 kB: from the heap
    small.append(torch.ones(1000))  # stays, and keeps the heap from shrinking
held = resident_bytes()
del large
for steps_done in (GIVE_BACK_EVERY + 1, GIVE_BACK_EVERY):
    give_back_freed(steps_done)
    print(held - resident_bytes())
assert all(block.sum() == 1000 for block in small)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_is_freed_between_blocks_that_stay_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    between, after = map(int, done.stdout.split())
    assert between < 50e6 < after
