"""One rank and one scale for every module of an adapter, for readers that know no others. What is computed stays the same; see `same_scale`."""

from __future__ import annotations

from collections import Counter
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotune.lora.layers import scale
from nemotune.lora.pairs import Adapter, Pairs


def is_same_scale(adapter: Adapter) -> bool:
    """Whether all modules have one rank and one alpha."""
    return len({(its.rank, its.alpha) for its in adapter.settings.values()}) == 1


def same_scale(adapter: Adapter) -> Adapter:
    """The adapter itself where its modules are alike. Else A and B get rows and columns of zeros up to the largest rank, which adds nothing to B A, and B is
    multiplied by its own scale over that of most modules, in fp64 and rounded once to fp32: exactly, where that is a power of two.
    """
    if is_same_scale(adapter):
        return adapter
    rank = max(its.rank for its in adapter.settings.values())
    ((common, _),) = Counter(map(scale, adapter.settings.values())).most_common(1)
    lora = adapter.lora.model_copy(update={"rank": rank, "alpha": common * rank, "rslora": False, "rank_pattern": {}, "alpha_pattern": {}})
    factors = {name: scale(its) / common for name, its in adapter.settings.items()}
    readers = {name: partial(_changed, adapter, name, rank, factor) for name, factor in factors.items()}
    settings = {name: lora.model_copy() for name in adapter.settings}
    dtype = adapter.dtype if all(factor == 1 for factor in factors.values()) else "F32"
    return Adapter(lora, Pairs(readers), adapter.magnitudes, settings, dtype)


def _changed(adapter: Adapter, name: str, rank: int, factor: float) -> tuple[Tensor, Tensor]:
    A, B = adapter.pairs[name]
    missing = rank - B.shape[-1]
    scaled = B if factor == 1 else (B.double() * factor).to(torch.float32)
    return F.pad(A, (0, 0, 0, missing)), F.pad(scaled, (0, missing))
