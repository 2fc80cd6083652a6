"""The selective state space of Mamba-2 in chunks (state space duality, arXiv 2405.21060, Listing 1), over a packed row.

Within a chunk the recurrence is a masked matrix product; from one chunk to the next only a state passes. The row is worked off
document by document and chunk by chunk, so that a chunk's decays, its largest values, stay in the processor's cache; nothing is
padded, and no sum crosses a border. B and C stay per group.

Memory: the forward keeps its inputs; the backward computes a document's states again, and then its chunks, last to first.
Precision: fp32 within a chunk, whatever the dtype of x, and one rounding of what leaves it.
Reference: `ssd_ref.py`. Suffixes here: Q tokens of a chunk, N heads, G groups, R heads per group, P head dim, S state, Z = R * P.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemotune.ops.documents import Documents
from nemotune.ops.kernels import uses_triton

LONGEST_CHUNK = 64  # on the CPU faster than 128 at every width: fewer decays, and they stay in the cache


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
    if uses_triton(x_TNP.device):
        from nemotune.ops import triton_ssd

        inputs = x_TNP, dt_TN, A_N, B_TGS, C_TGS, D_N, documents
        return triton_ssd.ssd(*inputs, chunk_size=chunk_size, final_states=final_states)
    chunks = documents.chunks(min(chunk_size, LONGEST_CHUNK))
    y_TNP, ends = _Scan.apply(x_TNP, dt_TN.float(), A_N.float(), B_TGS, C_TGS, D_N.float(), chunks, final_states)
    if not final_states:
        return y_TNP, None
    return y_TNP, ends.unflatten(-1, (-1, x_TNP.shape[-1])).permute(0, 1, 3, 4, 2).flatten(1, 2)  # [docs, G, S, Z] -> [docs, N, P, S]


class _Scan(torch.autograd.Function):
    """`chunks`: of each document, the rows of its chunks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunks: list[list[slice]], final_states: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, dt, A, B, C, D)
        ctx.chunks = chunks
        y, ends = torch.empty(x.shape, dtype=x.dtype, device=x.device), []
        for of_document in chunks:
            state = None
            for rows in of_document:
                chunk = _Chunk.of(rows, x, dt, A, B, C)
                y[rows] = chunk.outputs(state).addcmul_(chunk.x, D[:, None])
                if final_states or rows is not of_document[-1]:
                    state = chunk.next_state(state)
            ends.append(state)
        return y, torch.stack(ends) if final_states else y.new_empty(0)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dends: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, dt, A, B, C, D = ctx.saved_tensors
        dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
        dA, dD = torch.zeros_like(A), torch.zeros_like(D)
        for number, of_document in enumerate(ctx.chunks):
            states: list[Tensor | None] = [None]  # before each chunk
            for rows in of_document[:-1]:
                states.append(_Chunk.of(rows, x, dt, A, B, C).next_state(states[-1]))
            dstate = dends[number] if len(dends) else None
            for rows in reversed(of_document):
                chunk, dy_QNP = _Chunk.of(rows, x, dt, A, B, C), dy[rows].float()
                du, dlog, dB[rows], dC[rows], dstate = chunk.gradients(dy_QNP, states.pop(), dstate)
                dx[rows] = (du * chunk.dt.unsqueeze(-1)).addcmul_(dy_QNP, D[:, None])
                ddt[rows] = (du * chunk.x).sum(-1).addcmul_(dlog, A)
                dA += (dlog * chunk.dt).sum(0)
                dD += (dy_QNP * chunk.x).sum((0, 2)) if ctx.needs_input_grad[5] else 0
        return dx, ddt, dA, dB, dC, dD, None, None


@dataclass(frozen=True)
class _Chunk:
    """A chunk of a document in fp32. With `u = dt x` and `a` the log decay since the chunk's beginning, for a token i

    `y_i = sum_{j <= i} exp(a_i - a_j) (C_i B_j) u_j + exp(a_i) C_i h`, and after the chunk `h' = exp(a_Q) h + sum_j exp(a_Q - a_j) B_j u_j`.
    """

    x: Tensor  # [Q, N, P]
    dt: Tensor  # [Q, N]
    u: Tensor  # [Q, N, P]
    a: Tensor  # [Q, N]
    B: Tensor  # [G, Q, S]
    C: Tensor  # [G, Q, S]

    @classmethod
    def of(cls, rows: slice, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> _Chunk:
        x, dt = x[rows].float(), dt[rows]
        return cls(x, dt, x * dt.unsqueeze(-1), (dt * A).cumsum(0), B[rows].float().transpose(0, 1), C[rows].float().transpose(0, 1))

    def by_group(self, t_QNP: Tensor) -> Tensor:
        """[Q, N, P] -> [G, Q, Z]."""
        return t_QNP.view(len(t_QNP), len(self.B), -1).transpose(0, 1)

    def by_head(self, t_GQZ: Tensor) -> Tensor:
        """[G, Q, Z] -> [Q, N, P]."""
        return t_GQZ.transpose(0, 1).unflatten(-1, (-1, self.x.shape[-1])).flatten(1, 2)

    def by_group_and_head(self, t_NQQ: Tensor) -> Tensor:
        """[N, Q, Q] -> [G, R, Q, Q]."""
        return t_NQQ.unflatten(0, (len(self.B), -1))

    def decays(self) -> Tensor:
        """[N, Q, Q]: exp(a_i - a_j), zero above the diagonal, where it would grow without bound."""
        a_NQ = self.a.T.contiguous()
        return torch.sub(a_NQ.unsqueeze(-1), a_NQ.unsqueeze(-2)).clamp_(max=0).exp_().tril_()

    def scores(self) -> Tensor:
        """[G, 1, Q, Q]: C_i B_j."""
        return torch.bmm(self.C, self.B.mT).unsqueeze(1)

    def to_end(self) -> Tensor:
        """[Q, N, 1]: exp(a_Q - a_j)."""
        return (self.a[-1] - self.a).exp_().unsqueeze(-1)

    def decay(self) -> Tensor:
        """[G, 1, Z]: exp(a_Q)."""
        return self.a[-1].exp().repeat_interleave(self.x.shape[-1]).view(len(self.B), 1, -1)

    def outputs(self, state_GSZ: Tensor | None) -> Tensor:
        """[Q, N, P], without D's part."""
        weights_NQQ = self.decays()
        self.by_group_and_head(weights_NQQ).mul_(self.scores())
        y_QNP = torch.bmm(weights_NQQ, self.u.transpose(0, 1)).transpose(0, 1)
        if state_GSZ is not None:
            y_QNP.addcmul_(self.by_head(torch.bmm(self.C, state_GSZ)), self.a.exp().unsqueeze(-1))
        return y_QNP

    def next_state(self, state_GSZ: Tensor | None) -> Tensor:
        """The state after the chunk, [G, S, Z]."""
        weighted_GQZ = self.by_group(self.u * self.to_end())
        if state_GSZ is None:
            return torch.bmm(self.B.mT, weighted_GQZ)
        return torch.baddbmm(state_GSZ * self.decay(), self.B.mT, weighted_GQZ)

    def gradients(self, dy_QNP: Tensor, state_GSZ: Tensor | None, dstate_GSZ: Tensor | None) -> tuple[Tensor, ...]:
        """Of u, of each token's own log decay dt A, of B and C [Q, G, S], and of the state before, given those of y and of the state after."""
        decays_NQQ, scores_G1QQ, dy_NQP = self.decays(), self.scores(), dy_QNP.transpose(0, 1)
        weights_NQQ = (self.by_group_and_head(decays_NQQ) * scores_G1QQ).flatten(0, 1)
        du_QNP = torch.bmm(weights_NQQ.mT, dy_NQP).transpose(0, 1)
        dweights_NQQ = torch.bmm(dy_NQP, self.u.transpose(0, 1).mT)
        dscores_GQQ = self.by_group_and_head(dweights_NQQ.mul_(decays_NQQ)).sum(1)
        self.by_group_and_head(dweights_NQQ).mul_(scores_G1QQ)
        dweights_NQQ.diagonal(dim1=-2, dim2=-1).zero_()  # a token does not decay for itself: its term would leave its rounding
        da_QN = (dweights_NQQ.sum(-1) - dweights_NQQ.sum(-2)).T
        dB_GQS, dC_GQS = torch.bmm(dscores_GQQ.mT, self.C), torch.bmm(dscores_GQQ, self.B)
        dbefore_GSZ = None
        if state_GSZ is not None:
            decayed_QNP = dy_QNP * self.a.exp().unsqueeze(-1)
            da_QN = da_QN + (decayed_QNP * self.by_head(torch.bmm(self.C, state_GSZ))).sum(-1)
            dC_GQS.baddbmm_(self.by_group(decayed_QNP), state_GSZ.mT)
            dbefore_GSZ = torch.bmm(self.C.mT, self.by_group(decayed_QNP))
        if dstate_GSZ is not None:
            to_end_QN1 = self.to_end()
            du_end_QNP = self.by_head(torch.bmm(self.B, dstate_GSZ)) * to_end_QN1
            dB_GQS.baddbmm_(self.by_group(self.u * to_end_QN1), dstate_GSZ.mT)
            from_end_QN = (du_end_QNP * self.u).sum(-1)
            from_end_QN[-1] = 0  # as above
            da_QN = da_QN - from_end_QN
            da_QN[-1] += from_end_QN.sum(0)
            du_QNP += du_end_QNP
            if state_GSZ is not None:
                decayed_GSZ = dstate_GSZ * self.decay()
                da_QN[-1] += (decayed_GSZ * state_GSZ).sum(1).view(-1, self.x.shape[-1]).sum(-1)
                dbefore_GSZ += decayed_GSZ
        dlog_QN = da_QN.flip(0).cumsum(0).flip(0)
        return du_QNP, dlog_QN, dB_GQS.transpose(0, 1), dC_GQS.transpose(0, 1), dbefore_GSZ
