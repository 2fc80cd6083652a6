"""Causal attention over a packed row, document by document, and one decoding step against cached keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotune.ops.documents import Documents


def varlen_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents) -> Tensor:
    """Causal attention within each document; N query heads share K key-value heads. Returns [T, N, H]."""
    rows = zip(*(t.split(documents.lengths) for t in (q_TNH, k_TKH, v_TKH)), strict=True)
    return torch.cat([_causal(q, k, v) for q, k, v in rows])


def _causal(q_LNH: Tensor, k_LKH: Tensor, v_LKH: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q_LNH, k_LKH, v_LKH))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


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
