"""What to lower where the GPU's memory does not hold a run; what a run takes is estimated before it, by `nemotune plan`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nemotune.errors import TrainingError
from nemotune.recipe import Recipe


@contextmanager
def out_of_memory_is_readable(recipe: Recipe) -> Iterator[None]:
    """Make an allocation that failed a TrainingError that names the keys of `recipe` that take less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        words = ". ".join(str(error).strip().split(". ")[:3]).rstrip(".")  # what was asked for and is free; the allocator's account follows
        raise TrainingError("\n".join([f"{words}. What takes less, the cheapest first:", *_remedies(recipe)])) from error


def _remedies(recipe: Recipe) -> Iterator[str]:
    train, model = recipe.train, recipe.model
    if train.micro_batch_size > 1:
        yield f"train.micro_batch_size: got {train.micro_batch_size}; 1 takes the same steps, also on --resume"
    if train.activation_checkpointing in ("none", "selective"):
        yield f"train.activation_checkpointing: got {train.activation_checkpointing}; full computes activations again, also on --resume"
    if train.optimizer == "adamw":
        yield "train.optimizer: got adamw; adamw_8bit holds its moments in eight bits"
    if recipe.method == "lora" and model.quantization == "none":
        yield "model.quantization: got none; nf4 holds the frozen base in four bits"
    if recipe.method == "lora" and model.offload == "none":
        yield "model.offload: got none; experts holds those of a base that has any in the host's memory"
    yield f"data.sequence_length: got {recipe.data.sequence_length}; shorter rows, in a run begun anew"
