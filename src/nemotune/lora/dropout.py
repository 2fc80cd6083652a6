"""Dropout whose mask is a function of (seed, step, document, position, module, feature) and of nothing else.

So a token loses the same features under any micro batch, packing layout, world size and recomputation. The mask is a counter-based
hash, SplitMix64's finaliser (Steele, Lea and Flood, 2014), of which each value serves four features with 16 bits apiece.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser over int64; the shifts are logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


class DropoutKeys:
    """One key per token of the micro batch at hand, shared by all adapters of a model; set before each forward."""

    def __init__(self) -> None:
        self._keys_T: Tensor | None = None

    @property
    def of_tokens(self) -> Tensor:
        """The keys [T] of the row at hand."""
        assert self._keys_T is not None, "DropoutKeys.set comes before a training forward"
        return self._keys_T

    def of_rows(self, rows_N: Tensor | None) -> Tensor:
        """The keys of these tokens of the row, or of all."""
        return self.of_tokens if rows_N is None else self.of_tokens[rows_N]

    def set(self, *, seed: int, step: int, documents_T: Tensor, positions_T: Tensor) -> None:
        """Key each token by its document's index in the split and its position in the document."""
        run = mix(torch.tensor(seed, dtype=torch.int64) * GOLDEN + step).item()  # a number: a copy would wait for the device
        self._keys_T = mix(mix(documents_T.long() * GOLDEN + run) + positions_T.long())


def dropout(x_MD: Tensor, keys_M: Tensor, *, probability: float, module: int, first_feature: int = 0) -> Tensor:
    """x with features zeroed at `probability` (to 16 bits) and the rest scaled up; `module` tells adapters apart.

    Where x holds some of the features only, they are those from `first_feature` on. The backward keeps one byte a feature.
    """
    threshold = round(probability * 65536)
    last_feature = first_feature + x_MD.shape[-1]
    counters = torch.arange(first_feature // 4, -(-last_feature // 4), device=x_MD.device) * GOLDEN
    skipped = first_feature % 4
    bits = mix(mix(keys_M + module).unsqueeze(-1) + counters).view(torch.int16)[:, skipped : skipped + x_MD.shape[-1]]
    return x_MD * (bits >= threshold - 32768) * (65536 / (65536 - threshold))
