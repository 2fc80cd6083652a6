"""The selective state space of Mamba-2 in chunks (state space duality, arXiv 2405.21060, Listing 1), over a packed row.

Within a chunk the recurrence is a masked matrix product; between chunks only states pass. Chunks begin anew at each document
border, and so do their cumulative sums: one sum across a border would cost 4e-5 and bit-identity. B and C stay per group.
Reference: `ssd_ref.py`. Suffixes here: C chunks, Q tokens of a chunk, G groups, R heads per group, P head dim, S state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotune.ops.documents import Chunks, Documents


def ssd(
    x_TNP: Tensor,
    dt_TN: Tensor,
    A_N: Tensor,
    B_TGS: Tensor,
    C_TGS: Tensor,
    D_N: Tensor,
    documents: Documents,
    *,
    chunk_size: int,
    final_states: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Outputs [T, N, P] in the dtype of x and, if asked for, the fp32 state at the end of each document [docs, N, P, S].

    `dt_TN` is fp32 after softplus and clamp, `A_N` negative. Matrix products run in the dtype of x, decays and states in fp32.
    """
    num_heads, num_groups = A_N.shape[0], B_TGS.shape[1]
    chunks = documents.chunks(min(chunk_size, max(documents.lengths)))
    x_CQGRP = _in_chunks(x_TNP, chunks).unflatten(2, (num_groups, -1))
    dt_CQN = _in_chunks(dt_TN.float(), chunks)
    B_CGQS, C_CGQS = (_in_chunks(t, chunks).transpose(1, 2) for t in (B_TGS, C_TGS))

    log_decay_CNQ = (dt_CQN * A_N.float()).cumsum(1).transpose(1, 2)  # from the chunk's first token to each
    scaled_CGRQP = (x_CQGRP * dt_CQN.unflatten(2, (num_groups, -1)).unsqueeze(-1).to(x_CQGRP.dtype)).permute(0, 2, 3, 1, 4)

    y_CGRQP = _within_chunks(scaled_CGRQP, log_decay_CNQ, B_CGQS, C_CGQS)
    states = None
    if final_states or not all(chunks.first):
        ends_CGRPS = _chunk_states(scaled_CGRQP, log_decay_CNQ, B_CGQS)
        starts_CGRPS, states_CGRPS = _pass_states(ends_CGRPS, log_decay_CNQ[..., -1].exp().unflatten(1, (num_groups, -1)), chunks)
        y_CGRQP = y_CGRQP + _from_states(starts_CGRPS, log_decay_CNQ, C_CGQS)
        states = states_CGRPS[chunks.last_of_document].flatten(1, 2) if final_states else None

    y_TNP = y_CGRQP.permute(0, 3, 1, 2, 4).reshape(chunks.count * chunks.size, num_heads, -1).index_select(0, chunks.slots_T)
    return y_TNP + D_N.to(x_TNP.dtype)[:, None] * x_TNP, states


def _in_chunks(tensor_T: Tensor, chunks: Chunks) -> Tensor:
    """[T, ...] -> [C, Q, ...], zeros where a chunk is padded: with dt = 0 a token neither decays nor adds."""
    padded = tensor_T.new_zeros(chunks.count * chunks.size, *tensor_T.shape[1:])
    return padded.index_copy(0, chunks.slots_T, tensor_T).unflatten(0, (chunks.count, chunks.size))


def _within_chunks(scaled_CGRQP: Tensor, log_decay_CNQ: Tensor, B_CGQS: Tensor, C_CGQS: Tensor) -> Tensor:
    """What the tokens of a chunk add to each other: `((C B^T) * L) (dt x)`, L the decay from column to row. [C, G, R, Q, P]."""
    num_groups, size = B_CGQS.shape[1], B_CGQS.shape[2]
    above = torch.ones(size, size, dtype=torch.bool, device=B_CGQS.device).triu(1)
    between_CNQQ = log_decay_CNQ.unsqueeze(-1) - log_decay_CNQ.unsqueeze(-2)
    decay_CGRQQ = between_CNQQ.masked_fill(above, -torch.inf).exp().unflatten(1, (num_groups, -1))
    scores_CGQQ = C_CGQS @ B_CGQS.transpose(-1, -2)
    return (scores_CGQQ.unsqueeze(2) * decay_CGRQQ).to(scaled_CGRQP.dtype) @ scaled_CGRQP


def _chunk_states(scaled_CGRQP: Tensor, log_decay_CNQ: Tensor, B_CGQS: Tensor) -> Tensor:
    """The state that each chunk would end with if it began with none: [C, G, R, P, S], fp32."""
    num_groups, heads_per_group = scaled_CGRQP.shape[1:3]
    to_end_CGRQ = (log_decay_CNQ[..., -1:] - log_decay_CNQ).exp().unflatten(1, (num_groups, -1))
    weighted_CGRPQ = (scaled_CGRQP * to_end_CGRQ.unsqueeze(-1).to(scaled_CGRQP.dtype)).transpose(-1, -2)
    return (weighted_CGRPQ.flatten(2, 3) @ B_CGQS).float().unflatten(2, (heads_per_group, -1))


def _pass_states(ends_CGRPS: Tensor, decay_CGR: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """The recurrence over chunks: the state before and after each, starting from zero wherever a document does."""
    before, after = [], []
    state = torch.zeros_like(ends_CGRPS[0])
    for end, decay, first in zip(ends_CGRPS.unbind(0), decay_CGR[..., None, None].unbind(0), chunks.first, strict=True):
        before.append(torch.zeros_like(end) if first else state)
        state = end if first else end + decay * state
        after.append(state)
    return torch.stack(before), torch.stack(after)


def _from_states(starts_CGRPS: Tensor, log_decay_CNQ: Tensor, C_CGQS: Tensor) -> Tensor:
    """What the state before a chunk adds to its tokens: [C, G, R, Q, P]."""
    num_groups, heads_per_group = starts_CGRPS.shape[1:3]
    states_CGXS = starts_CGRPS.to(C_CGQS.dtype).flatten(2, 3)  # X = heads of the group x head dim
    y_CGRQP = (C_CGQS @ states_CGXS.transpose(-1, -2)).unflatten(-1, (heads_per_group, -1)).permute(0, 1, 3, 2, 4)
    return y_CGRQP * log_decay_CNQ.exp().unflatten(1, (num_groups, -1)).unsqueeze(-1).to(y_CGRQP.dtype)
