"""What one process computes of a micro batch: its row on the device, with the documents in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotune.data.loader import Batch
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
    return Row(
        batch.tokens_T.to(device, non_blocking=True), Documents(batch.cu_seqlens, device), batch.targets_T,
        batch.document_ids.to(device, non_blocking=True),
    )  # fmt: skip
