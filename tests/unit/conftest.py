"""What several folders of the tier read and none writes to."""

from __future__ import annotations

import pytest
from random_models import make


@pytest.fixture(scope="session")
def hybrid_dir(tmp_path_factory):
    """A random hybrid as transformers saves it."""
    path = tmp_path_factory.mktemp("models") / "hybrid"
    make("hybrid").save_pretrained(path)
    return path
