"""Weights on disk: reading safetensors directories by header, writing them tensor by tensor, and how names map to modules.

It knows files and names, never a model. Next: `models/loading.py` fills modules from it, `export/merge.py` streams through it.
"""

from nemotune.weights.checkpoint import Checkpoint, TensorInfo
from nemotune.weights.dtypes import is_finite
from nemotune.weights.layout import Layout
from nemotune.weights.mapping import Piece, Stack
from nemotune.weights.writer import WritePlan, write_checkpoint

__all__ = ["Checkpoint", "Layout", "Piece", "Stack", "TensorInfo", "WritePlan", "is_finite", "write_checkpoint"]
