"""Where documents and their chunks lie, computed without waiting for the device."""

from __future__ import annotations

import torch

from nemotune.ops.documents import Documents


def test_documents_read_the_borders_once():
    documents = Documents(torch.tensor([0, 3, 4, 30], dtype=torch.int32))
    documents.cu_seqlens = documents.cu_seqlens.to("meta")
    assert documents.indices_T.shape == documents.positions_T.shape == (30,)
    assert documents.indices_T.dtype == documents.positions_T.dtype == torch.int64  # as every kind of indexing takes them
    assert documents.chunks(8) == [[slice(0, 3)], [slice(3, 4)], [slice(4, 12), slice(12, 20), slice(20, 28), slice(28, 30)]]
