"""`nemotune train`: the training of a recipe alone; its data are prepared first where they are not there."""

from __future__ import annotations

from nemotune.cli.options import training_verb

app = training_verb("train", "Train, with checkpoints; save the adapter or the weights.")
