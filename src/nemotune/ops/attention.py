"""Causal attention over a packed row, document by document, and one decoding step against cached keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotune.ops.documents import Documents


def varlen_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents, keys: Documents | None = None) -> Tensor:
    """Causal attention within each document; N query heads share K key-value heads. Returns [T, N, H].

    `keys` says how many keys each document has, where some have more than queries: the queries are then its last tokens.

    On CUDA one FlashAttention kernel for the row, in the 16-bit dtypes and head dims that it has; else document by document. The kernel's
    gradients repeat to the bit only under `torch.use_deterministic_algorithms`.
    """
    if has_flash(q_TNH):
        keys = keys or documents
        return flash_attention()(
            q_TNH, k_TKH, v_TKH, documents.cu_seqlens, keys.cu_seqlens, max(documents.lengths), max(keys.lengths)
        )  # fmt: skip
    return attention_per_document(q_TNH, k_TKH, v_TKH, documents, keys)


def has_flash(q_TNH: Tensor) -> bool:
    """Whether FlashAttention-2 takes such queries: 16 bits, Ampere or later, a head dim of at most 256 that 8 divides."""
    if not q_TNH.is_cuda or q_TNH.dtype not in (torch.bfloat16, torch.float16):
        return False
    head_dim = q_TNH.shape[-1]
    return head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability(q_TNH.device) >= (8, 0)


@cache
def flash_attention() -> Callable[..., Tensor]:
    """torch's causal variable-length attention with shared heads; loaded on use, as it brings the compiler along (a second)."""
    from torch.nn.attention.varlen import varlen_attn

    takes_switch = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 shares heads unasked
    return partial(varlen_attn, window_size=(-1, 0), **({"enable_gqa": True} if takes_switch else {}))


def attention_per_document(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents, keys: Documents | None = None) -> Tensor:
    """`varlen_attention` as one call per document: on the CPU the fastest, 6 to 20 times faster than one call with a mask of blocks."""
    q_lengths, k_lengths = documents.lengths, (keys or documents).lengths
    rows = zip(q_TNH.split(q_lengths), k_TKH.split(k_lengths), v_TKH.split(k_lengths), strict=True)
    return torch.cat([_causal(q, k, v) for q, k, v in rows])


def _causal(q_LNH: Tensor, k_LKH: Tensor, v_LKH: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q_LNH, k_LKH, v_LKH))
    earlier = len(k_LKH) - len(q_LNH)  # keys before the first query, all of which it sees
    seen = q.new_ones(len(q_LNH), len(k_LKH), dtype=torch.bool).tril(earlier) if earlier else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=not earlier, enable_gqa=True)[0].transpose(0, 1)


def attention_step(q_BNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, lengths_B: Tensor) -> Tensor:
    """One query per sequence against the first `lengths_B` of L cached positions. Returns [B, N, H]."""
    seen_B11L = (torch.arange(k_BLKH.shape[1], device=lengths_B.device) < lengths_B.unsqueeze(-1))[:, None, None, :]
    q, k, v = q_BNH.unsqueeze(2), k_BLKH.transpose(1, 2), v_BLKH.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen_B11L, enable_gqa=True).squeeze(2)


def varlen_attention_ref(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents) -> Tensor:
    """`varlen_attention` as softmax(q k^T / sqrt(H)) v over the whole row, with a mask that ends at each border."""
    repeats = q_TNH.shape[1] // k_TKH.shape[1]
    k_TNH, v_TNH = (t.repeat_interleave(repeats, dim=1) for t in (k_TKH, v_TKH))
    scores_NTT = torch.einsum("tnh,snh->nts", q_TNH, k_TNH) * q_TNH.shape[-1] ** -0.5
    same_TT = documents.indices_T.unsqueeze(1) == documents.indices_T.unsqueeze(0)
    scores_NTT = scores_NTT.masked_fill(~same_TT.tril(), -torch.inf)
    return torch.einsum("nts,snh->tnh", scores_NTT.softmax(-1), v_TNH)
