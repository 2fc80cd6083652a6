"""How far the NF4 weights beside which an adapter learned are from the wide ones onto which it is merged, next to the adapter's own change.

A merged model computes with the wide ones: the adapter also learned to make up for some of that difference, which is no longer there.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from nemotune.export.stream import in_threads
from nemotune.export.tuned import Tuned
from nemotune.ops import nf4

SAMPLED_TENSORS = 32


@dataclass(frozen=True)
class Difference:
    """Root mean squares, in units of the wide weights' own."""

    nf4: float
    update: float


def nf4_difference(tuned: Tuned) -> Difference:
    """Over the first rows of a sample of the adapted tensors."""
    assert tuned.adapter is not None
    names = sorted(name for name in tuned.updates if "embed" not in name and not name.startswith("lm_head"))  # which stay wide
    sampled = random.Random(0).sample(names, min(SAMPLED_TENSORS, len(names)))
    sums = torch.tensor(in_threads(lambda name: _squares(name, tuned), sampled), dtype=torch.float64).sum(0)
    wide, lost, changed = (sums / sums[0]).sqrt().tolist() if sampled else (1.0, 0.0, 0.0)
    assert wide == 1.0
    return Difference(nf4=lost, update=changed)


def _squares(name: str, tuned: Tuned) -> list[float]:
    """Sums of squares: of the wide weights, of what NF4 changes, of what the adapter does."""
    assert tuned.adapter is not None
    start, stop = tuned.row_ranges(name)[0]
    wide = tuned.base.read_rows(name, start, stop)
    wide = wide[: len(wide) // nf4.BLOCK * nf4.BLOCK or None].float()  # whole blocks, however long the rows are
    if wide.numel() % nf4.BLOCK:
        return [0.0, 0.0, 0.0]  # too small for NF4
    lost = nf4.dequantize(nf4.quantize(wide), (wide.shape[0], wide.shape[1]), torch.float32) - wide
    changed = tuned.adapter.updated(wide, *tuned.updates[name]) - wide
    return [float(values.square().sum()) for values in (wide, lost, changed)]
