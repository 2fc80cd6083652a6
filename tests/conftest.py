"""What several tiers read and none writes to.

Where there is no GPU, Triton's kernels run in its interpreter, which it asks for once, when it is first imported (transformers does that).
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def hybrid_dir(tmp_path_factory):
    """A random hybrid as transformers saves it."""
    from random_models import make

    path = tmp_path_factory.mktemp("models") / "hybrid"
    make("hybrid").save_pretrained(path)
    return path


@pytest.fixture
def train(hybrid_dir, tmp_path):
    """The loop on that hybrid: `train_toy` in `tmp_path/<name>`."""
    from toy_loop import train_toy

    return lambda *settings, name="run", **options: train_toy(hybrid_dir, tmp_path / name, *settings, **options)
