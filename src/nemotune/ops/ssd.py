"""The selective state space of Mamba-2 in chunks (state space duality, arXiv 2405.21060, Listing 1), over a packed row.

Within a chunk the recurrence is a masked matrix product; between chunks only states pass. Chunks begin anew at each document
border, and so do their cumulative sums: one sum across a border would cost 4e-5 and bit-identity. B and C stay per group.

Memory: the row is worked off in stretches of chunks; each keeps its inputs for the backward and computes the rest again there,
since the decays between a chunk's tokens alone are 2 Q / P times the bytes of a bf16 x.
Precision: the factors of matrix products have the dtype of x; all else is fp32 and rounded once, as in mamba-ssm's kernels.
Reference: `ssd_ref.py`. Suffixes here: C chunks, Q tokens of a chunk, G groups, R heads per group, P head dim, S state.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemotune.ops.documents import Chunks, Documents
from nemotune.ops.recompute import recomputed

DECAYS_AT_ONCE = 2**25  # 134 MB in fp32


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

    `dt_TN` is fp32 after softplus and clamp, `A_N` negative.
    """
    size = min(chunk_size, max(documents.lengths))
    outputs, states = [], []
    state_NPS = x_TNP.new_zeros(*x_TNP.shape[1:], B_TGS.shape[-1], dtype=torch.float32)
    for chunks in documents.chunks(size, max(1, DECAYS_AT_ONCE // (len(A_N) * size**2))):
        scan = partial(_stretch, chunks=chunks, final_states=final_states)
        x, dt, B, C = (t[chunks.tokens] for t in (x_TNP, dt_TN.float(), B_TGS, C_TGS))
        y, state_NPS, ends = recomputed(scan, x, dt, A_N.float(), B, C, D_N.float(), state_NPS)
        outputs.append(y)
        states.append(ends)
    return torch.cat(outputs), torch.cat(states) if final_states else None


def _stretch(
    x_TNP: Tensor,
    dt_TN: Tensor,
    A_N: Tensor,
    B_TGS: Tensor,
    C_TGS: Tensor,
    D_N: Tensor,
    state_NPS: Tensor,
    *,
    chunks: Chunks,
    final_states: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The outputs of a stretch that begins with `state`, the state that it ends with, and those at the ends of its documents."""
    groups = (B_TGS.shape[1], -1)
    x_CQGRP, dt_CQGR = (_in_chunks(t, chunks).unflatten(2, groups) for t in (x_TNP, dt_TN))
    B_CGQS, C_CGQS = (_in_chunks(t, chunks).transpose(1, 2) for t in (B_TGS, C_TGS))
    log_decay_CQGR = (dt_CQGR * A_N.view(groups)).cumsum(1)  # from before the chunk to each token

    y_CQGRP = _within_chunks(x_CQGRP, dt_CQGR, log_decay_CQGR, B_CGQS, C_CGQS) + D_N.view(*groups, 1) * x_CQGRP
    if all(chunks.first) and chunks.last[-1] and not final_states:
        return _in_row(y_CQGRP.to(x_TNP.dtype), chunks), state_NPS, None
    ends_CGSRP = _chunk_states(x_CQGRP, dt_CQGR, log_decay_CQGR, B_CGQS)
    decay_CG1R1 = log_decay_CQGR[:, -1].exp()[:, :, None, :, None]
    state_GSRP = state_NPS.unflatten(0, groups).permute(0, 3, 1, 2)
    states_XGSRP = _PassStates.apply(ends_CGSRP, decay_CG1R1, state_GSRP, chunks.first)  # X = C + 1
    before_CGSRP, state_NPS = states_XGSRP[:-1], _as_NPS(states_XGSRP[-1])
    y_CQGRP = y_CQGRP + _from_states(before_CGSRP, log_decay_CQGR, C_CGQS)
    after_CNPS = _as_NPS(ends_CGSRP + decay_CG1R1 * before_CGSRP)[list(chunks.last)] if final_states else None
    return _in_row(y_CQGRP.to(x_TNP.dtype), chunks), state_NPS, after_CNPS


def _in_chunks(tensor_T: Tensor, chunks: Chunks) -> Tensor:
    """[T, ...] -> [C, Q, ...], zeros where a chunk is padded: with dt = 0 a token neither decays nor adds."""
    padded = tensor_T.new_zeros(len(chunks.first) * chunks.size, *tensor_T.shape[1:])
    return padded.index_copy(0, chunks.slots_T, tensor_T).unflatten(0, (-1, chunks.size))


def _in_row(y_CQGRP: Tensor, chunks: Chunks) -> Tensor:
    """[C, Q, G, R, P] -> [T, N, P]."""
    return y_CQGRP.flatten(2, 3).flatten(0, 1).index_select(0, chunks.slots_T)


def _as_NPS(state_GSRP: Tensor) -> Tensor:
    """[..., G, S, R, P] -> [..., N, P, S]."""
    return state_GSRP.movedim(-3, -1).flatten(-4, -3)


def _within_chunks(x_CQGRP: Tensor, dt_CQGR: Tensor, log_decay_CQGR: Tensor, B_CGQS: Tensor, C_CGQS: Tensor) -> Tensor:
    """What the tokens of a chunk add to each other: `((C B^T) * L * dt) x`, L the decay from column to row. [C, Q, G, R, P]."""
    log_decay_CGRQ, dt_CGRQ = (t.permute(0, 2, 3, 1) for t in (log_decay_CQGR, dt_CQGR))
    between_CGRQQ = log_decay_CGRQ.unsqueeze(-1) - log_decay_CGRQ.unsqueeze(-2)
    decay_CGRQQ = between_CGRQQ.clamp(max=0).exp().tril()  # above the diagonal it would grow without bound
    scores_CGQQ = product(C_CGQS, B_CGQS.transpose(-1, -2))
    weights_CGRQQ = scores_CGQQ.unsqueeze(2) * decay_CGRQQ * dt_CGRQ.unsqueeze(-2)
    return product(weights_CGRQQ.to(x_CQGRP.dtype), x_CQGRP.permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4)


def _chunk_states(x_CQGRP: Tensor, dt_CQGR: Tensor, log_decay_CQGR: Tensor, B_CGQS: Tensor) -> Tensor:
    """The state that each chunk would end with if it began with none: [C, G, S, R, P]."""
    to_end_CQGR = (log_decay_CQGR[:, -1:] - log_decay_CQGR).exp() * dt_CQGR
    weighted_CGQRP = (x_CQGRP * to_end_CQGR.unsqueeze(-1)).to(x_CQGRP.dtype).transpose(1, 2)
    return product(B_CGQS.transpose(-1, -2), weighted_CGQRP.flatten(3)).unflatten(-1, x_CQGRP.shape[3:])


def _from_states(before_CGSRP: Tensor, log_decay_CQGR: Tensor, C_CGQS: Tensor) -> Tensor:
    """What the state before each chunk adds to its tokens: [C, Q, G, R, P]."""
    y_CGQRP = product(C_CGQS, before_CGSRP.to(C_CGQS.dtype).flatten(3)).unflatten(-1, before_CGSRP.shape[3:])
    return y_CGQRP.transpose(1, 2) * log_decay_CQGR.exp().unsqueeze(-1)


class _PassStates(torch.autograd.Function):
    """The recurrence over chunks, `h_{c+1} = ends_c + decay_c h_c`, begun anew with each document: h before each chunk and after the last."""

    @staticmethod
    def forward(ctx: Any, ends: Tensor, decay: Tensor, state: Tensor, first: tuple[bool, ...]) -> Tensor:
        states = torch.cat([state.unsqueeze(0), torch.empty_like(ends)])
        h = states.unbind(0)
        for c, (end, by, begins) in enumerate(zip(ends.unbind(0), decay.unbind(0), first, strict=True)):
            if begins:
                h[c].zero_()
            torch.addcmul(end, by, h[c], out=h[c + 1])
        ctx.first = first
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        decay, states = ctx.saved_tensors
        grad = grad_states.clone()
        g = grad.unbind(0)
        for c, (by, begins) in reversed(list(enumerate(zip(decay.unbind(0), ctx.first, strict=True)))):
            if begins:
                g[c].zero_()
            else:
                g[c].addcmul_(by, g[c + 1])
        return grad[1:], (grad[1:] * states[:-1]).sum((-3, -1), keepdim=True), grad[0], None


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in fp32 whatever their dtype, over any number of leading dims that agree."""
    multiply = torch.bmm if a.dtype == torch.float32 else _Product.apply
    return multiply(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, a.shape[:-2])


class _Product(torch.autograd.Function):
    """16-bit factors, sums and result in fp32: no rounding of what is added to other terms."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        grad = grad.to(a.dtype)
        return grad @ b.transpose(-1, -2), a.transpose(-1, -2) @ grad
