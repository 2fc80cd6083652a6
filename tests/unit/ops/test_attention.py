"""Attention's one kernel on CUDA, as far as a CPU can tell: what it is called with and what comes back. Values: tests/gpu."""

from __future__ import annotations

import pytest
import torch

from nemotune.ops import attention
from nemotune.ops.attention import flash_attention, has_flash, varlen_attention, varlen_attention_ref
from nemotune.ops.documents import Documents


def test_flash_takes_a_packed_row_of_grouped_heads_and_gives_gradients(monkeypatch):
    """On the meta device, which has the kernel's shapes and none of its values."""
    monkeypatch.setattr(attention, "has_flash", lambda q: True)
    documents = Documents(torch.tensor([0, 2, 9], dtype=torch.int32))
    documents.cu_seqlens = documents.cu_seqlens.to("meta")
    q, k, v = (torch.empty(9, heads, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (4, 2, 2))
    y = varlen_attention(q, k, v, documents)
    y.sum().backward()
    assert (y.shape, q.grad.shape, k.grad.shape, v.grad.shape) == (q.shape, q.shape, k.shape, v.shape)


def test_flash_is_given_borders_and_the_longest_document(monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "has_flash", lambda q: True)
    monkeypatch.setattr(attention, "flash_attention", lambda: lambda *args: calls.append(args))
    documents = Documents(torch.tensor([0, 2, 9, 12], dtype=torch.int32))
    varlen_attention(torch.empty(12, 4, 8), torch.empty(12, 2, 8), torch.empty(12, 2, 8), documents)
    [(_, _, _, borders, key_borders, longest, longest_key)] = calls
    assert borders is key_borders is documents.cu_seqlens and longest == longest_key == 7
    keys = Documents(torch.tensor([0, 9, 16, 19], dtype=torch.int32))
    varlen_attention(torch.empty(12, 4, 8), torch.empty(19, 2, 8), torch.empty(19, 2, 8), documents, keys)
    assert calls[1][3] is documents.cu_seqlens and calls[1][4] is keys.cu_seqlens and calls[1][5:] == (7, 9)
    assert flash_attention().keywords["window_size"] == (-1, 0), "causal"


def test_queries_are_the_last_tokens_of_a_document_with_more_keys():
    whole = Documents(torch.tensor([0, 9, 11, 16], dtype=torch.int32))
    queries, is_query_T = Documents(torch.tensor([0, 3, 5, 6], dtype=torch.int32)), torch.tensor([0] * 6 + [1] * 5 + [0] * 4 + [1]).bool()
    q, k, v = (torch.randn(16, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    found = varlen_attention(q[is_query_T], k, v, queries, whole)
    assert torch.allclose(found, varlen_attention_ref(q, k, v, whole)[is_query_T], atol=1e-6)


@pytest.mark.parametrize(
    "dtype, head_dim, capability, expected",
    [
        (torch.bfloat16, 128, (9, 0), True),
        (torch.float16, 64, (8, 0), True),
        (torch.float32, 128, (9, 0), False),
        (torch.bfloat16, 12, (9, 0), False),
        (torch.bfloat16, 512, (9, 0), False),
        (torch.bfloat16, 128, (7, 5), False),
    ],
)
def test_flash_runs_where_its_kernel_does(dtype, head_dim, capability, expected, monkeypatch):
    class OnCUDA:
        is_cuda, device = True, None

    query = OnCUDA()
    query.dtype, query.shape = dtype, (5, 4, head_dim)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_flash(query) is expected
    assert not has_flash(torch.empty(5, 4, 64, dtype=torch.bfloat16))
