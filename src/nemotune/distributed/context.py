"""Long rows in pieces: what a mixer's core needs of the tokens in other processes. Projections, norms, MLPs and experts are each token's own.

Pieces and their exchange are `pieces.py`. In one exchange per core and pass, forward and again backward, a piece is given
- for attention: the keys and values that its first document has before it;
- for the convolution: the kernel - 1 inputs before it;
- for the scan: of each piece before it in that document, the state at its end when it begins with zero, and the decay over it.
No process waits for another's result of the same pass. Rows that are no pieces, those of generation, pass as in one process.

Suffixes as in `ops/`: T tokens of the piece, L of its first document, N heads, K key-value heads or earlier pieces, H, P head dim, G groups, S state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nemotune.distributed.pieces import Piece, rows_before
from nemotune.distributed.world import World
from nemotune.models import CausalLM
from nemotune.models.cache import KVState, MambaState
from nemotune.models.layers import AttentionCore
from nemotune.models.nemotron_h import CausalConv, Scan
from nemotune.ops.attention import varlen_attention
from nemotune.ops.documents import Documents
from nemotune.ops.ssd import ssd


def connect(model: CausalLM, world: World) -> None:
    """Let the mixers of `model` see across pieces."""
    group = world.group("context")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, AttentionCore):
                setattr(module, name, PieceAttention(group))
            elif isinstance(child, CausalConv):
                setattr(module, name, PieceConv(group))
            elif isinstance(child, Scan):
                setattr(module, name, PieceScan(child.chunk_size, group))


class PieceAttention(AttentionCore):
    """Each query against the keys of its document up to itself, wherever they were made."""

    def __init__(self, group: Any):
        super().__init__()
        self.group = group

    def forward(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents, state: KVState | None) -> Tensor:
        if not isinstance(documents, Piece):
            return super().forward(q_TNH, k_TKH, v_TKH, documents, state)
        kv_T2KH = torch.stack([k_TKH, v_TKH], dim=1)
        before = rows_before(kv_T2KH, documents.traffic(), self.group)
        k, v = torch.cat([before, kv_T2KH]).unbind(1)
        return varlen_attention(q_TNH, k, v, documents, documents.extended(documents.before))


class PieceConv(CausalConv):
    """The convolution over the piece and the few inputs before it, whose own outputs are dropped."""

    def __init__(self, group: Any):
        super().__init__()
        self.group = group

    def forward(self, x_TC: Tensor, conv1d: nn.Conv1d, documents: Documents, state: MambaState | None) -> Tensor:
        if not isinstance(documents, Piece):
            return super().forward(x_TC, conv1d, documents, state)
        before = rows_before(x_TC, documents.traffic(conv1d.weight.shape[-1] - 1), self.group)
        y = super().forward(torch.cat([before, x_TC]), conv1d, documents.extended(len(before)), None)
        return y[len(before) :]


class PieceScan(Scan):
    """The scan from a zero state, and what the state before the piece adds to the outputs of its first document."""

    def __init__(self, chunk_size: int, group: Any):
        super().__init__(chunk_size)
        self.group = group

    def forward(
        self,
        x_TNP: Tensor,
        dt_TN: Tensor,
        A_N: Tensor,
        B_TGS: Tensor,
        C_TGS: Tensor,
        D_N: Tensor,
        documents: Documents,
        state: MambaState | None,
    ) -> Tensor:
        if not isinstance(documents, Piece):
            return super().forward(x_TNP, dt_TN, A_N, B_TGS, C_TGS, D_N, documents, state)
        y_TNP, ends = ssd(x_TNP, dt_TN, A_N, B_TGS, C_TGS, D_N, documents, chunk_size=self.chunk_size, final_states=True)
        assert ends is not None
        log_decay_TN = dt_TN.float() * A_N.float()
        before_NPS = self._state_before(ends[-1], log_decay_TN[-documents.lengths[-1] :].sum(0), documents)
        continued = documents.lengths[0] if documents.before else 0
        y_TNP[:continued] += _outputs(before_NPS, log_decay_TN[:continued].cumsum(0), C_TGS[:continued])
        return y_TNP

    def _state_before(self, end_NPS: Tensor, log_decay_N: Tensor, piece: Piece) -> Tensor:
        """The state with which the piece's first document comes in, zeros where it begins here; given this piece's end and decay, fp32."""
        summary_1X = torch.cat([end_NPS.flatten(), log_decay_N]).unsqueeze(0)
        received_KX = rows_before(summary_1X, piece.traffic().capped(), self.group)
        ends_KX, log_decays_KN = received_KX.split([end_NPS.numel(), len(log_decay_N)], dim=1)
        later_KK1 = torch.ones(len(ends_KX), len(ends_KX), device=end_NPS.device).triu(1).unsqueeze(-1)
        decays_KN = (later_KK1 * log_decays_KN).sum(1).exp()  # over the pieces after each
        return (decays_KN[..., None, None] * ends_KX.unflatten(1, end_NPS.shape)).sum(0)


def _outputs(state_NPS: Tensor, log_decay_LN: Tensor, C_LGS: Tensor) -> Tensor:
    """`exp(log decay) h C`: what a state adds to the outputs after it, [L, N, P] in fp32."""
    by_group_GRPS = state_NPS.unflatten(0, (C_LGS.shape[1], -1))
    y_LNP = torch.einsum("grps,lgs->lgrp", by_group_GRPS, C_LGS.float()).flatten(1, 2)
    return y_LNP * log_decay_LN.exp().unsqueeze(-1)
