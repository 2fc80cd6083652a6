"""A random hybrid on disk, and the loop on it in a directory of the test."""

from __future__ import annotations

import pytest
from random_models import make
from toy_loop import train_toy


@pytest.fixture(scope="session")
def hybrid_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "hybrid"
    make("hybrid").save_pretrained(path)
    return path


@pytest.fixture
def train(hybrid_dir, tmp_path):
    """`train_toy` in `tmp_path/<name>`."""
    return lambda *settings, name="run", **options: train_toy(hybrid_dir, tmp_path / name, *settings, **options)
