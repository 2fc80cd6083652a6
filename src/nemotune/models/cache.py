"""What generation remembers per sequence: keys and values of attention, convolution window and SSM state of Mamba.

A cache is filled by one forward over all prompts, then advanced one token per sequence at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotune.ops.documents import Documents


class KVState:
    """Keys and values of one attention layer, [B, max_length, K, H], with the number of tokens that each sequence holds."""

    def __init__(self, batch_size: int, max_length: int, num_heads: int, head_dim: int, *, dtype: torch.dtype, device: torch.device):
        self.k_BLKH = torch.zeros(batch_size, max_length, num_heads, head_dim, dtype=dtype, device=device)
        self.v_BLKH = torch.zeros_like(self.k_BLKH)
        self.lengths_B = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.is_empty = True

    def fill(self, k_TKH: Tensor, v_TKH: Tensor, documents: Documents) -> None:
        """Store the prompts, document b in row b."""
        self.k_BLKH[documents.indices_T, documents.positions_T] = k_TKH
        self.v_BLKH[documents.indices_T, documents.positions_T] = v_TKH
        self.lengths_B += torch.tensor(documents.lengths, device=self.lengths_B.device)
        self.is_empty = False

    def append(self, k_BKH: Tensor, v_BKH: Tensor) -> None:
        """Store one token per sequence."""
        rows = torch.arange(len(self.lengths_B), device=self.lengths_B.device)
        self.k_BLKH[rows, self.lengths_B] = k_BKH
        self.v_BLKH[rows, self.lengths_B] = v_BKH
        self.lengths_B += 1

    def select(self, rows: Tensor) -> None:
        """Keep the sequences `rows`."""
        self.k_BLKH, self.v_BLKH, self.lengths_B = self.k_BLKH[rows], self.v_BLKH[rows], self.lengths_B[rows]


@dataclass
class MambaState:
    """The last inputs of the convolution [B, width - 1, C] and the fp32 state [B, N, P, S] of one Mamba layer; None before the prompts."""

    conv_BWC: Tensor | None = None
    ssm_BNPS: Tensor | None = None

    def select(self, rows: Tensor) -> None:
        """Keep the sequences `rows`."""
        assert self.conv_BWC is not None and self.ssm_BNPS is not None, "the prompts come first"
        self.conv_BWC, self.ssm_BNPS = self.conv_BWC[rows], self.ssm_BNPS[rows]


@dataclass
class Cache:
    """One state per layer (None for layers that mix no tokens), and the number of tokens that each sequence holds."""

    layers: list[KVState | MambaState | None]
    lengths_B: Tensor

    def positions_T(self, documents: Documents) -> Tensor:
        """The positions of the tokens about to be seen."""
        return self.lengths_B[documents.indices_T] + documents.positions_T

    def advance(self, documents: Documents) -> None:
        """Count the tokens just seen."""
        self.lengths_B = self.lengths_B + torch.tensor(documents.lengths, device=self.lengths_B.device)

    def select(self, rows: Tensor) -> None:
        """Keep the sequences `rows`: finished ones leave the batch."""
        self.lengths_B = self.lengths_B[rows]
        for state in self.layers:
            if state is not None:
                state.select(rows)
