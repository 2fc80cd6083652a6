"""The loop on a random hybrid, in a directory of the test."""

from __future__ import annotations

import pytest
from toy_loop import train_toy


@pytest.fixture
def train(hybrid_dir, tmp_path):
    """`train_toy` in `tmp_path/<name>`."""
    return lambda *settings, name="run", **options: train_toy(hybrid_dir, tmp_path / name, *settings, **options)
