"""What one process computes of a micro batch: its row on the device, or its piece of it, with the documents in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotune.data.loader import FILLER, IGNORED, Batch
from nemotune.distributed.pieces import Piece
from nemotune.distributed.world import World
from nemotune.ops.documents import Documents


@dataclass(frozen=True)
class Row:
    """Tokens [T] and the numbers of their documents [docs] on the device, targets [T] where the batch has them."""

    tokens_T: Tensor
    documents: Documents
    targets_T: Tensor
    document_ids: Tensor


def row_of(batch: Batch, device: torch.device, world: World) -> Row:
    """The row of `batch`, or this process's piece of it."""
    if world.degrees.context > 1:
        return _piece_of(batch, device, rank=world.index("context"), ranks=world.degrees.context)
    return Row(
        batch.tokens_T.to(device, non_blocking=True), Documents(batch.cu_seqlens, device), batch.targets_T,
        batch.document_ids.to(device, non_blocking=True),
    )  # fmt: skip


def _piece_of(batch: Batch, device: torch.device, *, rank: int, ranks: int) -> Row:
    """The targets were shifted in the whole row. Where nothing is left for this rank, one token that nothing counts."""
    piece = Piece(batch.cu_seqlens, device, rank=rank, ranks=ranks)
    if piece.is_empty:
        zero = torch.zeros(1, dtype=torch.int64)
        return Row(zero.to(device), piece, zero + IGNORED, (zero + FILLER).to(device))
    tokens_T, document_ids = batch.tokens_T[piece.tokens], batch.document_ids[piece.numbers]
    return Row(tokens_T.to(device, non_blocking=True), piece, batch.targets_T[piece.tokens], document_ids.to(device, non_blocking=True))
