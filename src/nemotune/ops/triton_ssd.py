"""`ssd.ssd` as Triton kernels, for CUDA: Mamba-2's chunked scan (arXiv 2405.21060, Listing 1). Here the forward and what autograd sees;
the gradients' kernels are in `triton_ssd_backward.py`, the PyTorch path in `ssd.py`, the reference in `ssd_ref.py`.

Within a chunk, with l_i = sum_{k <= i} dt_k A over its tokens and h the state before it:
    y_i = sum_{j <= i} (C_i . B_j) exp(l_i - l_j) dt_j x_j + exp(l_i) h C_i + D x_i
    h'  = exp(l_end) h + sum_j exp(l_end - l_j) dt_j x_j B_j^T
Three kernels: each chunk's own part of h' and l; the recurrence over a document's chunks; y. As in mamba-ssm's
`mamba_chunk_scan_combined`, but chunks begin anew at each border and are read from the row where they lie, whatever their length.
Saved are the inputs alone: the backward computes the states again. Forward and backward each hold a state per chunk while they run, and
every document has a chunk: with documents of a few tokens each, these outgrow the row.

Precision: the factors of matrix products have the dtype of x, sums, states and decays are fp32. No atomics: results repeat to the bit.
Import on use only: Triton need not be there. Suffixes: Q tokens of a block, P head dim, S state; a state is [P, S]. What there is one of
per head and token lies [N, T]. R heads share a group's B and C. BQ, BP and BS are powers of two, as Triton's tiles have to be.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotune.ops.documents import ChunkBorders, Documents


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
    """See `ssd.ssd`."""
    B_TGS, C_TGS = B_TGS.to(x_TNP.dtype), C_TGS.to(x_TNP.dtype)
    return _SSD.apply(x_TNP, dt_TN.float(), A_N.float(), B_TGS, C_TGS, D_N.float(), documents, chunk_size, final_states)


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, documents: Documents, chunk_size: int, final: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, dt, A, B, C, D)
        ctx.borders = borders = documents.chunk_borders(min(chunk_size, max(documents.lengths)))
        final_states = x.new_empty(len(documents.lengths), *x.shape[1:], B.shape[-1], dtype=torch.float32) if final else None
        dt_NT = dt.T.contiguous()
        log_decay_NT, states = states_before_chunks(x, dt_NT, A, B, borders, final_states)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        by = sizes(x, B)
        grid = len(states), triton.cdiv(borders.size, by["BQ"]), x.shape[1]
        _outputs[grid](*in_rows(x, B, C), dt_NT, D, log_decay_NT, states, borders.chunks, y, *x.shape[:2], **by)
        return y, final_states

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from nemotune.ops.triton_ssd_backward import gradients

        if grad_y is None:
            grad_y = torch.zeros_like(ctx.saved_tensors[0])
        return *gradients(*ctx.saved_tensors, grad_y, grad_final, ctx.borders), None, None, None


def states_before_chunks(
    x: Tensor, dt_NT: Tensor, A: Tensor, B: Tensor, borders: ChunkBorders, final_states: Tensor | None
) -> tuple[Tensor, Tensor]:
    """l [N, T] in fp32 and h [chunks, N, P, S] in the dtype of x; fills `final_states`."""
    (T, N, _), num_chunks = x.shape, len(borders.chunks) - 1
    log_decay_NT, own = torch.empty_like(dt_NT), x.new_empty(num_chunks, *x.shape[1:], B.shape[-1], dtype=torch.float32)
    _chunk_states[num_chunks, N](*in_rows(x, B), dt_NT, A, log_decay_NT, own, borders.chunks, T, N, **sizes(x, B))
    return log_decay_NT, pass_states(own, log_decay_NT, borders, final_states, x.dtype, reverse=False)


def pass_states(
    own: Tensor, log_decay_NT: Tensor, borders: ChunkBorders, edge: Tensor | None, dtype: torch.dtype, *, reverse: bool
) -> Tensor:
    """From what each chunk adds, what reaches it: h before it or, in reverse, the gradient of h' after it. fp32, rounded as factors are.

    `edge` [docs, N, P, S] takes the states that leave the documents; in reverse it gives the gradients that enter there.
    """
    (N, T), size, block = log_decay_NT.shape, own[0, 0].numel(), 1024
    passed, grid = torch.empty_like(own, dtype=dtype), (len(borders.documents) - 1, N, triton.cdiv(size, block))
    _pass_states[grid](own, passed, log_decay_NT, borders.chunks, borders.documents, edge, T, N, size, REVERSE=reverse, BLOCK=block)
    return passed


def in_rows(*tensors: Tensor) -> list[Any]:
    """Each as [T, ...] with the values of a token side by side, and the stride between tokens. Slices of wider rows are not copied."""
    arguments: list[Any] = []
    for tensor in tensors:
        rows = tensor.flatten(1)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        arguments += [rows, rows.stride(0)]
    return arguments


def sizes(x: Tensor, B: Tensor) -> dict[str, int]:
    """What the kernels are compiled for: blocks that fit the registers and 99 KB of shared memory for states of up to 128 x 128."""
    (_, N, P), (_, G, S) = x.shape, B.shape
    BP, BS = (max(16, triton.next_power_of_2(width)) for width in (P, S))
    BQ = 64 if x.element_size() == 2 and BP * BS <= 64 * 128 else 32
    return dict(R=N // G, P=P, S=S, BQ=BQ, BP=BP, BS=BS, num_warps=8, num_stages=1)


@triton.jit
def _chunk_states(
    x, x_stride, B, B_stride, dt, A, log_decay, states, chunks, T, N,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """l, and `sum_j exp(l_end - l_j) dt_j x_j B_j^T`: block by block, as the recurrence over chunks goes."""
    c, n = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(chunks + c), tl.load(chunks + c + 1)
    A_n = tl.load(A + n)
    log_before = A_n * 0
    state_PS = tl.zeros((BP, BS), tl.float32)
    for first in range(start, end, BQ):
        t = first + tl.arange(0, BQ)
        dt_Q = of_head(dt, n, t, end, T)
        log_Q = tl.cumsum(dt_Q * A_n, 0)
        log_end = tl.sum(dt_Q * A_n, 0)
        put_of_head(log_decay, n, t, end, T, log_before + log_Q)
        x_QP, B_QS = of_tokens(x, x_stride, t, end, n, P, BP), of_tokens(B, B_stride, t, end, n // R, S, BS)
        weighted_QP = x_QP * (tl.exp(log_end - log_Q) * dt_Q)[:, None]
        state_PS = tl.exp(log_end) * state_PS + product(tl.trans(weighted_QP.to(x_QP.dtype)), B_QS)
        log_before += log_end
    put_state(states, c, n, N, state_PS, P, S, BP, BS)


@triton.jit
def _pass_states(own, passed, log_decay, chunks, documents, edge, T, N, size, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """`h_{c+1} = exp(l_end) h_c + its own part` over the chunks of a document, for a block of a head's state."""
    d, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(documents + d), tl.load(documents + d + 1)
    at_edge = d.to(tl.int64) * N * size + n * size + k
    state = tl.zeros((BLOCK,), tl.float32)
    if REVERSE and edge is not None:
        state = tl.load(edge + at_edge, mask=k < size, other=0.0)
    for step in range(last - first):
        c = last - 1 - step if REVERSE else first + step
        here = (c.to(tl.int64) * N + n) * size + k
        tl.store(passed + here, state.to(passed.dtype.element_ty), mask=k < size)
        state = tl.exp(tl.load(log_decay + n * T + tl.load(chunks + c + 1) - 1)) * state + tl.load(own + here, mask=k < size, other=0.0)
    if not REVERSE and edge is not None:
        tl.store(edge + at_edge, state, mask=k < size)


@triton.jit
def _outputs(
    x, x_stride, B, B_stride, C, C_stride, dt, D, log_decay, states, chunks, y, T, N,
    R: tl.constexpr, P: tl.constexpr, S: tl.constexpr, BQ: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """y of a block of tokens i and a head: from the state before the chunk, then from each block of tokens j up to its own."""
    c, n = tl.program_id(0), tl.program_id(2)
    start, end = tl.load(chunks + c), tl.load(chunks + c + 1)
    first_i = start + tl.program_id(1) * BQ
    if first_i >= end:
        return
    i = first_i + tl.arange(0, BQ)
    log_i = of_head(log_decay, n, i, end, T)
    C_iS = of_tokens(C, C_stride, i, end, n // R, S, BS)
    h_PS = get_state(states, c, n, N, P, S, BP, BS)
    y_iP = product(C_iS, tl.trans(h_PS)) * tl.exp(log_i)[:, None]
    for first_j in range(start, first_i + 1, BQ):
        j = first_j + tl.arange(0, BQ)
        dt_j, log_j = of_head(dt, n, j, end, T), of_head(log_decay, n, j, end, T)
        x_jP, B_jS = of_tokens(x, x_stride, j, end, n, P, BP), of_tokens(B, B_stride, j, end, n // R, S, BS)
        weights_ij = product(C_iS, tl.trans(B_jS)) * decay(i[:, None], j[None, :], log_i[:, None], log_j[None, :], end) * dt_j[None, :]
        y_iP += product(weights_ij.to(x_jP.dtype), x_jP)
    y_iP += tl.load(D + n) * of_tokens(x, x_stride, i, end, n, P, BP)
    put_of_tokens(y, N * P, i, end, n, P, BP, y_iP)


@triton.jit
def product(a, b):
    """a @ b, summed in fp32; factors of fp32 are not cut to tf32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def decay(i, j, log_i, log_j, end):
    """exp(l_i - l_j) from token j to a later token i of the chunk, else 0: there it would grow without bound."""
    return tl.where((j <= i) & (i < end), tl.exp(log_i - log_j), 0.0)


@triton.jit
def of_head(base, n, t, end, T):
    """The values of head n at tokens t, zero from `end` on."""
    return tl.load(base + n.to(tl.int64) * T + t, mask=t < end, other=0.0)


@triton.jit
def put_of_head(base, n, t, end, T, value):
    tl.store(base + n.to(tl.int64) * T + t, value, mask=t < end)


@triton.jit
def of_tokens(base, stride, t, end, part, width: tl.constexpr, BLOCK: tl.constexpr):
    """The `width` values of head or group `part` at tokens t: [tokens, BLOCK], zeros beyond."""
    k = tl.arange(0, BLOCK)
    return tl.load(
        base + t.to(tl.int64)[:, None] * stride + (part * width + k)[None, :], mask=(t < end)[:, None] & (k < width)[None, :], other=0.0
    )


@triton.jit
def put_of_tokens(base, stride, t, end, part, width: tl.constexpr, BLOCK: tl.constexpr, value):
    k = tl.arange(0, BLOCK)
    here = base + t.to(tl.int64)[:, None] * stride + (part * width + k)[None, :]
    tl.store(here, value.to(base.dtype.element_ty), mask=(t < end)[:, None] & (k < width)[None, :])


@triton.jit
def get_state(states, c, n, N, P: tl.constexpr, S: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr):
    """The state of head n at chunk c: [BP, BS], zeros beyond P and S."""
    p, s = tl.arange(0, BP)[:, None], tl.arange(0, BS)[None, :]
    return tl.load(states + (c.to(tl.int64) * N + n) * P * S + p * S + s, mask=(p < P) & (s < S), other=0.0)


@triton.jit
def put_state(states, c, n, N, value, P: tl.constexpr, S: tl.constexpr, BP: tl.constexpr, BS: tl.constexpr):
    p, s = tl.arange(0, BP)[:, None], tl.arange(0, BS)[None, :]
    tl.store(states + (c.to(tl.int64) * N + n) * P * S + p * S + s, value, mask=(p < P) & (s < S))
