"""Where documents and their chunks lie, computed without waiting for the device."""

from __future__ import annotations

import torch

from nemotune.ops.documents import Documents


def test_documents_read_the_borders_once():
    documents = Documents(torch.tensor([0, 3, 4, 30], dtype=torch.int32))
    documents.cu_seqlens = documents.cu_seqlens.to("meta")
    assert documents.indices_T.shape == documents.positions_T.shape == (30,)
    assert documents.indices_T.dtype == documents.positions_T.dtype == torch.int64  # as every kind of indexing takes them
    assert [chunks.slots_T.shape for chunks in documents.chunks(8, 4)] == [(20,), (10,)]


def test_chunks_cut_at_borders_and_at_the_limit():
    documents = Documents(torch.tensor([0, 3, 4, 30], dtype=torch.int32))
    first, second = documents.chunks(8, 4)
    assert (first.tokens, first.first, first.last) == (slice(0, 20), (True, True, True, False), (True, True, False, False))
    assert (second.tokens, second.first, second.last) == (slice(20, 30), (False, False), (False, True))
    assert first.slots_T.tolist() == [0, 1, 2, 8, *range(16, 32)] and second.slots_T.tolist() == list(range(10))
