"""A frozen layer with a low-rank update beside it: `y = W x + scale B A dropout(x)`. A and B are fp32 and compute in the dtype of x.

DoRA gives each row of the updated weight a length of its own, which is learned. Embeddings look a column of A up instead. `wrap` gives
a layer its LoRA form; merging is `export/merge.py`, on files.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotune.lora.dropout import GOLDEN, DropoutKeys, dropout, mix
from nemotune.models.layers import GroupedLinear, Linear
from nemotune.models.quantize import NF4Linear
from nemotune.ops.experts import Dispatch
from nemotune.ops.grouped import grouped_linear
from nemotune.ops.nf4 import dequantize
from nemotune.recipe import Lora
from nemotune.weights import Layout


class LoRALayer(nn.Module):
    """What all forms share; `base` is the frozen layer, `lora_A` [..., rank, in], `lora_B` [..., out, rank], but for embeddings."""

    def __init__(self, base: Linear | GroupedLinear | nn.Embedding, lora: Lora, *, name: str, keys: DropoutKeys, seed: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale(lora)
        self.probability, self.keys, self.module_id = lora.dropout, keys, zlib.crc32(name.encode())
        self._make(lora.rank, base.device if isinstance(base, GroupedLinear) else next(chain(base.parameters(), base.buffers())).device)
        if not any(parameter.is_meta for parameter in self.parameters(recurse=False)):
            # the same for a module under any order of modules; 32 bits are all that a generator takes
            self._draw(torch.Generator().manual_seed(zlib.crc32(self.module_id.to_bytes(4, "big"), seed)))

    def _make(self, rank: int, device: torch.device) -> None:
        experts = (self.base.num_experts,) if isinstance(self.base, GroupedLinear) else ()
        self.lora_A = nn.Parameter(torch.empty(*experts, rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(*experts, self.out_features, rank, device=device))

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> None:
        """A as PEFT draws it, Kaiming uniform with a = sqrt(5); B stays zero. Where a part is held, that part of the whole A."""
        A = self.layouts()["lora_A"]
        bound = 1 / math.sqrt(A.shape[-1])
        self.lora_A.copy_(A.take(torch.rand(A.shape, generator=generator) * 2 * bound - bound))

    def layouts(self) -> dict[str, Layout]:
        """Which part of each of its tensors this process holds: it follows from the weight's."""
        shapes = {name: tuple(p.shape) for name, p in self.named_parameters(recurse=False)}
        part = self.base.part
        if part is None:
            return {name: Layout.whole(shape) for name, shape in shapes.items()}
        *experts, out, inputs = part.shape
        *of_experts, of_out, of_inputs = part.ranges
        rank = shapes["lora_A"][-2]
        every_rank = ((0, rank),)
        found = {
            "lora_A": Layout((*experts, rank, inputs), (*of_experts, every_rank, of_inputs)),
            "lora_B": Layout((*experts, out, rank), (*of_experts, of_out, every_rank)),
            "lora_magnitude_vector": Layout((out,), (of_out,)),
        }
        return {name: found[name] for name in shapes}

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def drops(self) -> bool:
        return self.training and self.probability > 0

    def _drop(self, x: Tensor, keys_M: Tensor) -> Tensor:
        first = self.base.part.ranges[-1][0][0] if self.base.part else 0  # of the features of x among those of the whole
        return dropout(x, keys_M, probability=self.probability, module=self.module_id, first_feature=first)


class LoRALinear(LoRALayer):
    """LoRA on a linear layer. The head sees some tokens only: it is told which (`rows_N`), and T is their number."""

    def forward(self, x_TI: Tensor, rows_N: Tensor | None = None) -> Tensor:
        return self._plus_low_rank(self.base(x_TI), self._dropped(x_TI, rows_N))

    def _dropped(self, x_TI: Tensor, rows_N: Tensor | None) -> Tensor:
        return self._drop(x_TI, self.keys.of_rows(rows_N)) if self.drops else x_TI

    def _plus_low_rank(self, y_TO: Tensor, x_TI: Tensor) -> Tensor:
        low_TR = F.linear(x_TI, self.lora_A.to(x_TI.dtype))
        return torch.addmm(y_TO, low_TR, self.lora_B.to(x_TI.dtype).T, alpha=self.scale)


class DoRALinear(LoRALinear):
    """DoRA (arXiv 2402.09353): `V = W + scale B A`, its rows scaled to the lengths `lora_magnitude_vector` [out], which begin as W's.

    `y = m / |V| (V x)`, where |V| counts as a constant in the backward (section 4.3). Dropout as in PEFT: with d the dropped x,
    `y = W x - W d + m / |V| (V d)`.
    """

    def __init__(self, base: Linear, lora: Lora, *, name: str, keys: DropoutKeys, seed: int):
        super().__init__(base, lora, name=name, keys=keys, seed=seed)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(self.out_features, device=self.lora_A.device))
        if not self.lora_A.is_meta:
            with torch.no_grad():
                self.lora_magnitude_vector.copy_(self._norms_O())

    def forward(self, x_TI: Tensor, rows_N: Tensor | None = None) -> Tensor:
        dropped_TI, bias = self._dropped(x_TI, rows_N), self.base.bias
        plain_TO = self._without_bias(dropped_TI)
        gain_O = self.lora_magnitude_vector / self._norms_O()  # fp32: in bf16 gains near 1 would be 1
        y_TO = gain_O * self._plus_low_rank(plain_TO, dropped_TI)
        if self.drops:
            y_TO = y_TO + (self._without_bias(x_TI) - plain_TO)
        return (y_TO if bias is None else y_TO + bias).to(x_TI.dtype)

    def _without_bias(self, x_TI: Tensor) -> Tensor:
        y_TO = self.base(x_TI)
        return y_TO if self.base.bias is None else y_TO - self.base.bias.to(y_TO.dtype)

    @torch.no_grad()
    def _norms_O(self) -> Tensor:
        """|V| row by row, fp32; over zero, where a row of zeros stays one."""
        base = self.base
        weight_OI = dequantize(base.quantized, base.shape, torch.float32) if isinstance(base, NF4Linear) else base.weight.float()
        # baddbmm, since selective checkpointing keeps what addmm returns: here a whole weight in fp32
        updated_OI = torch.baddbmm(weight_OI[None], self.lora_B[None], self.lora_A[None], alpha=self.scale)[0]
        return torch.linalg.vector_norm(updated_OI, dim=1).clamp(min=torch.finfo(torch.float32).tiny)


class LoRAExperts(LoRALayer):
    """LoRA on one projection of all experts: A [E, rank, in] and B [E, out, rank], two more grouped products."""

    @property
    def first_expert(self) -> int:
        """Where those that this process holds begin among all of the layer."""
        return self.base.part.ranges[0][0][0] if self.base.part else 0

    def forward(self, x_MI: Tensor, sent: Dispatch) -> Tensor:
        dropped_MI = self._drop(x_MI, expert_keys(self.keys.of_tokens, sent, self.first_expert)) if self.drops else x_MI
        low_MR = grouped_linear(dropped_MI, self.lora_A, sent.ends_E) * self.scale
        return self.base(x_MI, sent) + grouped_linear(low_MR, self.lora_B, sent.ends_E)


class LoRAEmbedding(LoRALayer):
    """LoRA on embeddings: `y = E[x] + scale B A[:, x]`, A [rank, vocabulary] and B [hidden, rank], computed in fp32 and rounded once.

    As PEFT's: A begins at zero and B normal, and there is no dropout. The gradient of A is as large as A, whatever tokens it saw.
    """

    def _make(self, rank: int, device: torch.device) -> None:
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, self.base.num_embeddings, device=device))
        self.lora_embedding_B = nn.Parameter(torch.empty(self.base.embedding_dim, rank, device=device))

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> None:
        self.lora_embedding_B.copy_(torch.randn(self.lora_embedding_B.shape, generator=generator))

    def forward(self, tokens_T: Tensor) -> Tensor:
        y_TD = self.base(tokens_T)
        low_TR = F.embedding(tokens_T, self.lora_embedding_A.T)
        return torch.addmm(y_TD.float(), low_TR, self.lora_embedding_B.T, alpha=self.scale).to(y_TD.dtype)


def expert_keys(keys_T: Tensor, sent: Dispatch, first_expert: int = 0) -> Tensor:
    """A key per row sorted by expert: its token's, told apart by the expert; those that are here begin at `first_expert`."""
    return mix(sent.of_tokens(keys_T) + (first_expert + sent.experts_M + 1) * GOLDEN)


def scale(lora: Lora) -> float:
    """What B A is multiplied by."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def wrap(base: nn.Module, lora: Lora, *, name: str, keys: DropoutKeys, seed: int) -> LoRALayer:
    """The LoRA form of `base`."""
    form: type[LoRALayer] = DoRALinear if lora.dora else LoRALinear
    if not isinstance(base, Linear):
        form = LoRAExperts if isinstance(base, GroupedLinear) else LoRAEmbedding
    return form(base, lora, name=name, keys=keys, seed=seed).train(base.training)


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """(name of the adapted module, its LoRA form), in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield name, module
