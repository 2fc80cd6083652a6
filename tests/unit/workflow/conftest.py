"""A short recipe, a cache of its own, and an engine that trains nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from toy_run import SETTINGS

from nemotune.engines import native
from nemotune.recipe import load


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMOTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def recipe():
    return load("quickstart", SETTINGS)


@pytest.fixture
def trained_at_once(monkeypatch):
    """An engine that leaves the directory of what was trained, and nothing in it."""

    def train(recipe, prepared, *, run_dir, **_):
        (run_dir / native.trained_name(recipe)).mkdir(exist_ok=True)
        (run_dir / "metrics.jsonl").touch()
        return SimpleNamespace(steps=2, weights="last", ended="finished")

    monkeypatch.setattr(native, "train", train)
