"""Freed memory goes back to the system."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch

from nemotune.train.memory import GIVE_BACK_EVERY, give_back_freed


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_is_freed_between_blocks_that_stay_goes_back_to_the_system():
    large, small = [], []
    for _ in range(1000):
        large.append(torch.ones(25_000))  # 100 kB: from the heap
        small.append(torch.ones(1000))  # stays, and keeps the heap from shrinking
    held = resident_bytes()
    del large
    give_back_freed(GIVE_BACK_EVERY + 1)
    assert held - resident_bytes() < 50e6
    give_back_freed(GIVE_BACK_EVERY)
    assert held - resident_bytes() > 50e6
    assert all(block.sum() == 1000 for block in small)
