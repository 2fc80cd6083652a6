"""The gradients of `triton_ssd`, whose docstring has the equations and the suffixes.

With g the gradient of h', the state after the chunk, and dy that of y:
    u_j  = sum_{i >= j} (C_i . B_j) exp(l_i - l_j) dy_i + exp(l_end - l_j) g B_j              dx_j = dt_j u_j + D dy_j
    dC_i = sum_{j <= i} (dy_i . x_j) exp(l_i - l_j) dt_j B_j + exp(l_i) dy_i h                summed over the heads of a group
    dB_j = sum_{i >= j} (dy_i . x_j) exp(l_i - l_j) dt_j C_i + exp(l_end - l_j) dt_j x_j g    the same
    g is exp(l_end) g + sum_i exp(l_i) dy_i C_i^T of the chunk after it: the forward's recurrence, last to first
dt_k A is in every decay that passes token k: pairs j < k <= i, h to i, j to the end, h to the end. The pairs are the sums of the rows i
from k on less those of the columns j from k on; without i = j in either, so that nothing large cancels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotune.ops.documents import ChunkBorders
from nemotune.ops.triton_ssd import (  # fmt: skip  # fmt: skip
    decay,
    get_state,
    in_rows,
    of_head,
    of_tokens,
    pass_states,
    product,
    put_of_head,
    put_of_tokens,
    put_state,
    sizes,
    states_before_chunks,
)


def gradients(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dy: Tensor, d_final: Tensor | None, borders: ChunkBorders
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of x, dt, A, B, C and D. Those of A and D come along for the price of a sum over chunks, or tokens."""
    (T, N, _), (_, G, _), by = x.shape, B.shape, sizes(x, B)
    dt_NT = dt.T.contiguous()
    log_NT, h = states_before_chunks(x, dt_NT, A, B, borders, None)
    (x_, B_, C_, dy_), chunks = (in_rows(t) for t in (x, B, C, dy)), borders.chunks
    num_chunks, grid = len(h), (len(h), triton.cdiv(borders.size, by["BQ"]), G)

    own = torch.empty_like(h, dtype=torch.float32)
    _chunk_state_gradients[num_chunks, N](*dy_, *C_, log_NT, own, chunks, T, N, **by)
    g = pass_states(own, log_NT, borders, None if d_final is None else d_final.contiguous(), x.dtype, reverse=True)

    dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C))
    d_log_NT, to_end_NT, d_dt_NT, dD_NT = (torch.empty_like(dt_NT) for _ in range(4))
    _row_gradients[grid](*x_, *B_, *C_, *dy_, dt_NT, log_NT, h, chunks, dC, d_log_NT, T, N, **by)
    _column_gradients[grid](
        *x_, *B_, *C_, *dy_, dt_NT, D, log_NT, g, chunks, dx, dB, d_log_NT, to_end_NT, d_dt_NT, dD_NT, T, N, **by
    )  # fmt: skip

    dA_CN, by["BQ"] = dt.new_empty(num_chunks, N), triton.next_power_of_2(borders.size)
    _decay_gradients[num_chunks, N](d_log_NT, to_end_NT, dt_NT, A, log_NT, h, g, chunks, d_dt_NT, dA_CN, T, N, **by)
    return dx, d_dt_NT.T, dA_CN.sum(0), dB, dC, dD_NT.sum(1)


@triton.jit
def _chunk_state_gradients(
    dy, dy_stride, C, C_stride, log_decay, g, chunks, T, N,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """What a chunk's outputs want of the state before it: `sum_i exp(l_i) dy_i C_i^T`."""
    c, n = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(chunks + c), tl.load(chunks + c + 1)
    g_PS = tl.zeros((BP, BS), tl.float32)
    for first in range(start, end, BQ):
        i = first + tl.arange(0, BQ)
        dy_iP, C_iS = of_tokens(dy, dy_stride, i, end, n, P, BP), of_tokens(C, C_stride, i, end, n // R, S, BS)
        weighted_iP = dy_iP * tl.exp(of_head(log_decay, n, i, end, T))[:, None]
        g_PS += product(tl.trans(weighted_iP.to(dy_iP.dtype)), C_iS)
    put_state(g, c, n, N, g_PS, P, S, BP, BS)


@triton.jit
def _row_gradients(
    x, x_stride, B, B_stride, C, C_stride, dy, dy_stride, dt, log_decay, h, chunks, dC, d_log, T, N,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """dC of a block of tokens i and a group; of each of its heads the sum of row i: what l_i adds to, from h and from each j before i."""
    c, group = tl.program_id(0), tl.program_id(2)
    start, end = tl.load(chunks + c), tl.load(chunks + c + 1)
    first_i = start + tl.program_id(1) * BQ
    if first_i >= end:
        return
    i = first_i + tl.arange(0, BQ)
    C_iS = of_tokens(C, C_stride, i, end, group, S, BS)
    dC_iS = tl.zeros((BQ, BS), tl.float32)
    for head in range(R):
        n = group * R + head
        dy_iP, log_i = of_tokens(dy, dy_stride, i, end, n, P, BP), of_head(log_decay, n, i, end, T)
        h_PS = get_state(h, c, n, N, P, S, BP, BS)
        from_h_iS = product(dy_iP, h_PS) * tl.exp(log_i)[:, None]
        d_log_i = tl.sum(from_h_iS * C_iS, 1)
        dC_iS += from_h_iS
        for first_j in range(start, first_i + 1, BQ):
            j = first_j + tl.arange(0, BQ)
            dt_j, log_j = of_head(dt, n, j, end, T), of_head(log_decay, n, j, end, T)
            x_jP, B_jS = of_tokens(x, x_stride, j, end, n, P, BP), of_tokens(B, B_stride, j, end, group, S, BS)
            d_scores_ij = (
                product(dy_iP, tl.trans(x_jP)) * decay(i[:, None], j[None, :], log_i[:, None], log_j[None, :], end) * dt_j[None, :]
            )
            pairs_ij = product(C_iS, tl.trans(B_jS)) * d_scores_ij
            d_log_i += tl.sum(tl.where(j[None, :] < i[:, None], pairs_ij, 0.0), 1)
            dC_iS += product(d_scores_ij.to(B_jS.dtype), B_jS)
        put_of_head(d_log, n, i, end, T, d_log_i)
    put_of_tokens(dC, N // R * S, i, end, group, S, BS, dC_iS)


@triton.jit
def _column_gradients(
    x, x_stride, B, B_stride, C, C_stride, dy, dy_stride, dt, D, log_decay, g, chunks, dx, dB, d_log, to_end, d_dt, dD, T, N,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """dB of a block of tokens j and a group; of each of its heads dx, x_j . u_j (the gradient of dt_j beside l), dy_j . x_j, the sum of column j."""
    c, group = tl.program_id(0), tl.program_id(2)
    start, end = tl.load(chunks + c), tl.load(chunks + c + 1)
    first_j = start + tl.program_id(1) * BQ
    if first_j >= end:
        return
    j = first_j + tl.arange(0, BQ)
    B_jS = of_tokens(B, B_stride, j, end, group, S, BS)
    dB_jS = tl.zeros((BQ, BS), tl.float32)
    for head in range(R):
        n = group * R + head
        x_jP, dt_j, log_j = of_tokens(x, x_stride, j, end, n, P, BP), of_head(dt, n, j, end, T), of_head(log_decay, n, j, end, T)
        g_PS = get_state(g, c, n, N, P, S, BP, BS)
        decay_j = tl.where(j < end, tl.exp(tl.load(log_decay + n.to(tl.int64) * T + end - 1) - log_j), 0.0)
        u_jP = product(B_jS, tl.trans(g_PS)) * decay_j[:, None]
        to_end_j = tl.sum(u_jP * x_jP, 1)
        dB_jS += product(x_jP, g_PS) * (decay_j * dt_j)[:, None]
        to_later_j, to_itself_j = tl.zeros((BQ,), tl.float32), tl.zeros((BQ,), tl.float32)
        for first_i in range(first_j, end, BQ):
            i = first_i + tl.arange(0, BQ)
            log_i = of_head(log_decay, n, i, end, T)
            dy_iP, C_iS = of_tokens(dy, dy_stride, i, end, n, P, BP), of_tokens(C, C_stride, i, end, group, S, BS)
            decay_ji = decay(i[None, :], j[:, None], log_i[None, :], log_j[:, None], end)
            weights_ji = product(B_jS, tl.trans(C_iS)) * decay_ji
            d_weights_ji = product(x_jP, tl.trans(dy_iP))
            pairs_ji = weights_ji * d_weights_ji
            to_later_j += tl.sum(tl.where(j[:, None] < i[None, :], pairs_ji, 0.0), 1)
            to_itself_j += tl.sum(tl.where(j[:, None] == i[None, :], pairs_ji, 0.0), 1)
            u_jP += product(weights_ji.to(dy_iP.dtype), dy_iP)
            dB_jS += product((d_weights_ji * decay_ji * dt_j[:, None]).to(C_iS.dtype), C_iS)
        put_of_head(d_dt, n, j, end, T, to_itself_j + to_later_j + to_end_j)
        put_of_head(to_end, n, j, end, T, dt_j * to_end_j)
        put_of_head(d_log, n, j, end, T, of_head(d_log, n, j, end, T) - dt_j * to_later_j)
        dy_jP = of_tokens(dy, dy_stride, j, end, n, P, BP)
        put_of_tokens(dx, N * P, j, end, n, P, BP, dt_j[:, None] * u_jP + tl.load(D + n) * dy_jP)
        put_of_head(dD, n, j, end, T, tl.sum(dy_jP.to(tl.float32) * x_jP, 1))
    put_of_tokens(dB, N // R * S, j, end, group, S, BS, dB_jS)


@triton.jit
def _decay_gradients(
    d_log, to_end, dt, A, log_decay, h, g, chunks, d_dt, dA, T, N,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The gradient of dt_k A for each token k of a chunk and a head; from it the rest of ddt, and the chunk's part of dA."""
    c, n = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(chunks + c), tl.load(chunks + c + 1)
    k = start + tl.arange(0, BQ)
    dt_k, to_end_k = of_head(dt, n, k, end, T), of_head(to_end, n, k, end, T)
    h_PS, g_PS = get_state(h, c, n, N, P, S, BP, BS).to(tl.float32), get_state(g, c, n, N, P, S, BP, BS)
    h_to_end = tl.exp(tl.load(log_decay + n.to(tl.int64) * T + end - 1)) * tl.sum(tl.sum(h_PS * g_PS, 1), 0)
    d_dtA_k = tl.cumsum(of_head(d_log, n, k, end, T), 0, reverse=True) + tl.cumsum(to_end_k, 0) - to_end_k + h_to_end
    put_of_head(d_dt, n, k, end, T, of_head(d_dt, n, k, end, T) + tl.load(A + n) * d_dtA_k)
    tl.store(dA + c.to(tl.int64) * N + n, tl.sum(dt_k * d_dtA_k, 0))
