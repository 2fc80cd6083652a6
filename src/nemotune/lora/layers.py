"""A frozen layer with a low-rank update beside it: `y = W x + scale B A dropout(x)`. A and B are fp32 and compute in the dtype of x.

`wrap` gives a layer its LoRA form; merging is `export/merge.py`, on files.
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
from nemotune.ops.experts import Dispatch, grouped_linear
from nemotune.recipe import Lora


class LoRALayer(nn.Module):
    """What both forms share; `base` is the frozen layer, `lora_A` [..., rank, in], `lora_B` [..., out, rank]."""

    def __init__(self, base: Linear | GroupedLinear, lora: Lora, *, name: str, keys: DropoutKeys, seed: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale(lora)
        self.probability, self.keys, self.module_id = lora.dropout, keys, zlib.crc32(name.encode())
        experts = (base.num_experts,) if isinstance(base, GroupedLinear) else ()
        device = next(chain(base.parameters(), base.buffers())).device
        self.lora_A = nn.Parameter(torch.empty(*experts, lora.rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(*experts, base.out_features, lora.rank, device=device))
        if device.type != "meta":
            self._draw(seed)

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        """A as PEFT draws it, Kaiming uniform with a = sqrt(5): the same for a module under any order of modules; B stays zero."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.module_id.to_bytes(4, "big"), seed))  # 32 bits are all that it takes
        bound = 1 / math.sqrt(self.in_features)
        self.lora_A.copy_(torch.rand(self.lora_A.shape, generator=generator) * 2 * bound - bound)

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
        return dropout(x, keys_M, probability=self.probability, module=self.module_id)


class LoRALinear(LoRALayer):
    """LoRA on a linear layer. The head sees some tokens only: it is told which (`rows_N`), and T is their number."""

    def forward(self, x_TI: Tensor, rows_N: Tensor | None = None) -> Tensor:
        dropped_TI = self._drop(x_TI, self.keys.of_rows(rows_N)) if self.drops else x_TI
        low_TR = F.linear(dropped_TI, self.lora_A.to(x_TI.dtype))
        return torch.addmm(self.base(x_TI), low_TR, self.lora_B.to(x_TI.dtype).T, alpha=self.scale)


class LoRAExperts(LoRALayer):
    """LoRA on one projection of all experts: A [E, rank, in] and B [E, out, rank], two more grouped products."""

    def forward(self, x_MI: Tensor, sent: Dispatch) -> Tensor:
        dropped_MI = self._drop(x_MI, expert_keys(self.keys.of_tokens, sent)) if self.drops else x_MI
        low_MR = grouped_linear(dropped_MI, self.lora_A, sent.ends_E) * self.scale
        return self.base(x_MI, sent) + grouped_linear(low_MR, self.lora_B, sent.ends_E)


def expert_keys(keys_T: Tensor, sent: Dispatch) -> Tensor:
    """A key per row sorted by expert: its token's, told apart by the expert."""
    return mix(keys_T[sent.tokens_M] + (sent.experts_M + 1) * GOLDEN)


def scale(lora: Lora) -> float:
    """What B A is multiplied by."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def wrap(base: nn.Module, lora: Lora, *, name: str, keys: DropoutKeys, seed: int) -> LoRALayer:
    """The LoRA form of `base`."""
    form = LoRAExperts if isinstance(base, GroupedLinear) else LoRALinear
    return form(base, lora, name=name, keys=keys, seed=seed).train(base.training)


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """(name of the adapted module, its LoRA form), in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield name, module
