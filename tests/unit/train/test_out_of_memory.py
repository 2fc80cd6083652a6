"""A GPU that is too small is an error with a remedy, not a traceback."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console
from toy_split import ToySplit

from nemotune.engines import native
from nemotune.errors import TrainingError
from nemotune.recipe import load
from nemotune.train.out_of_memory import out_of_memory_is_readable

TOLD = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.99 GiB of which 1.12 GiB is free. "
    "Including non-PyTorch memory, this process has 22.85 GiB memory in use. Of the allocated memory 22.10 GiB is allocated by PyTorch"
)
BEGINS = TOLD.partition(" Including")[0] + " What takes less"
LARGE = "train.micro_batch_size=2", "train.activation_checkpointing=none", "train.optimizer=adamw"
SMALL = "train.micro_batch_size=1", "train.activation_checkpointing=full", "train.optimizer=adamw_8bit"


def told(*settings):
    with pytest.raises(TrainingError) as error, out_of_memory_is_readable(load("quickstart", settings)):
        raise torch.OutOfMemoryError(TOLD)
    return str(error.value)


def test_every_key_that_takes_less_is_named_with_what_it_is():
    first, *keys = told(*LARGE, "data.sequence_length=4096").splitlines()
    assert first.startswith(BEGINS)
    assert [key.partition(";")[0] for key in keys] == [
        "train.micro_batch_size: got 2", "train.activation_checkpointing: got none", "train.optimizer: got adamw",
        "model.quantization: got none", "model.offload: got none", "data.sequence_length: got 4096",
    ]  # fmt: skip


@pytest.mark.parametrize("settings", [("model.quantization=nf4", "model.offload=experts"), ("method=full", "export.merged=false")])
def test_what_is_small_already_is_not_named(settings):
    assert [line.partition(":")[0] for line in told(*SMALL, *settings).splitlines()[1:]] == ["data.sequence_length"]


@pytest.mark.parametrize("where", ["load_base", "run_training"])
def test_loading_and_training_say_so(monkeypatch, tmp_path, where):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError(TOLD)

    recipe = load("quickstart", LARGE)
    prepared = type("Prepared", (), {"train": ToySplit([9]), "validation": None})()
    monkeypatch.setattr(native, where, fails)
    with pytest.raises(TrainingError, match=BEGINS):
        native.train(recipe, prepared, run_dir=tmp_path, resume=False, console=Console(quiet=True))
    assert not (tmp_path / "adapter").exists()
