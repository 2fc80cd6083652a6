"""A base that lies on the hub: its weights are fetched by what reads weights, and by nothing before that."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch

import huggingface_hub
import pytest
from rich.console import Console

from nemotune import assets
from nemotune.errors import MissingFileError
from nemotune.models import load_model, load_tokenizer, locate
from nemotune.recipe import load
from nemotune.workflow import stages

HUB_ID = "someone/small-nemotron"
WEIGHTS = "model.safetensors"


@pytest.fixture
def fetched(tmp_path, monkeypatch) -> set[str]:
    """The files fetched so far from a hub whose one repository holds the built-in model."""
    hub, snapshot, files = assets.resolve("nemotron-tiny"), tmp_path / "snapshot", set()
    snapshot.mkdir()

    def snapshot_download(repository, *, revision, allow_patterns):
        assert (repository, revision) == (HUB_ID, None)
        for file in hub.iterdir():
            if file.is_file() and any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(file, snapshot / file.name)
                files.add(file.name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setenv("NEMOTUNE_CACHE", str(tmp_path / "cache"))
    return files


@pytest.fixture
def recipe():
    return load("quickstart", [f"model.path={HUB_ID}", "data.max_samples=20", "data.test=0.2"])


def test_weights_are_not_fetched_to_look_ahead(fetched, recipe, tmp_path):
    quiet, run_dir = Console(quiet=True), tmp_path / "run"
    dry = {"run_dir": run_dir, "overwrite": False, "dry_run": True, "console": quiet}
    stages.plan(recipe, console=quiet)
    stages.run(recipe, **dry, resume=False)
    stages.data(recipe, **{**dry, "dry_run": False}, show=1)
    stages.train(recipe, **dry, resume=False)
    (run_dir / "adapter").mkdir()
    stages.evaluate(recipe, **dry)
    stages.score(recipe, **dry, model=HUB_ID)
    stages.merge(recipe, **dry, output=None)
    assert "tokenizer.json" in fetched and WEIGHTS not in fetched


def test_a_merge_of_what_was_not_trained_fetches_nothing(fetched, recipe, tmp_path):
    with pytest.raises(MissingFileError, match="nothing trained yet"):
        stages.merge(recipe, run_dir=tmp_path, output=None, overwrite=False, dry_run=False, console=Console(quiet=True))
    assert not fetched


def test_tokenizer_and_drawn_weights_need_none_either(fetched):
    assert load_tokenizer(HUB_ID).chat_template
    load_model(HUB_ID, random_seed=0)
    assert {"config.json", "tokenizer.json"} <= fetched and WEIGHTS not in fetched


def test_reading_the_weights_fetches_them(fetched):
    load_model(HUB_ID)
    assert WEIGHTS in fetched


@pytest.mark.parametrize("name", ["nvidia/", "nvidia/a b", "nvidia/-x-.git"])
def test_what_cannot_be_a_hub_id_is_named(name):
    with pytest.raises(MissingFileError, match="model.path: "):
        locate(name)
