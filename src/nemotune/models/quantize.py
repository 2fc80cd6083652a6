"""Modules whose frozen weights are NF4: the same names and products as those of layers.py, a quarter of the bytes.

Quantised are the linear layers of the blocks and the stacked experts; embeddings, head, router, norms, convolutions and the per-head
parameters of Mamba stay as they are. A quantised model trains adapters and answers; it is never saved, since what it lost is lost:
an adapter merges onto the wide base. What four bits mean is in ops/nf4.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nemotune.models.base import CausalLM
from nemotune.models.layers import GroupedLinear, Linear
from nemotune.ops import nf4
from nemotune.ops.experts import Dispatch
from nemotune.ops.nf4 import BLOCK, NF4, nf4_grouped_linear, nf4_linear


class _Quantized(nn.Module):
    """The fields of an NF4 as buffers."""

    shape: tuple[int, ...]

    def hold(self, shape: tuple[int, ...], device: torch.device | str | None) -> None:
        self.shape = shape
        for name, field in nf4.empty(shape, device=device)._asdict().items():
            self.register_buffer(f"nf4_{name}", field, persistent=False)

    @property
    def quantized(self) -> NF4:
        return NF4(*(getattr(self, f"nf4_{name}") for name in NF4._fields))

    @torch.no_grad()
    def fill(self, weight_OI: Tensor, index: int | None) -> None:
        """Quantise one matrix where it lies, and copy it into its place."""
        place = self.quantized if index is None else self.quantized.at(index)
        for field, value in zip(place, nf4.quantize(weight_OI), strict=True):
            field.copy_(value)


class NF4Linear(Linear, _Quantized):
    """A linear layer over NF4."""

    def __init__(self, plain: Linear, device: torch.device | str | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.bias = plain.bias
        self.hold((self.out_features, self.in_features), device)

    def forward(self, x: Tensor) -> Tensor:
        y = nf4_linear(x, self.quantized, self.shape)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class NF4GroupedLinear(GroupedLinear, _Quantized):
    """One linear layer per expert over NF4."""

    def __init__(self, plain: GroupedLinear, device: torch.device | str | None = None):
        nn.Module.__init__(self)
        self.num_experts, self.in_features, self.out_features = plain.num_experts, plain.in_features, plain.out_features
        self.part = plain.part
        self.hold((self.num_experts, self.out_features, self.in_features), device)

    def forward(self, x_MI: Tensor, sent: Dispatch) -> Tensor:
        if self.lent is None:
            return nf4_grouped_linear(x_MI, self.quantized, self.shape, sent.ends_E)
        return super().forward(x_MI, sent)

    def lent_weights(self, rows_M: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
        return nf4.reached(NF4(*self.lent()), self.shape, rows_M, ends_E)


def quantize_modules(
    model: CausalLM, *, device: torch.device | str | None = None, experts_device: torch.device | str | None = None
) -> dict[str, NF4Linear | NF4GroupedLinear]:
    """Replace every module of `model` that NF4 can hold, empty, by the name of its weight. The others keep their width.

    Experts lie on `experts_device` if one is given.
    """
    replaced: dict[str, NF4Linear | NF4GroupedLinear] = {}
    for name, module in list(model.named_modules()):
        if not name or module is model.lm_head or not _fits(module):
            continue
        form = NF4GroupedLinear(module, experts_device or device) if isinstance(module, GroupedLinear) else NF4Linear(module, device)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, form)
        replaced[f"{name}.weight"] = form
    return replaced


def is_quantized(model: CausalLM) -> bool:
    return any(isinstance(module, _Quantized) for module in model.modules())


def quantized_parameters(model: CausalLM) -> int:
    """How many weights of `model` are held in NF4."""
    return sum(math.prod(module.shape) for module in model.modules() if isinstance(module, _Quantized))


def widest_weight(module: nn.Module) -> int:
    """The weights of the largest matrix or stack in `module` that is NF4; 0 where none is."""
    return max((math.prod(part.shape) for part in module.modules() if isinstance(part, _Quantized)), default=0)


def _fits(module: nn.Module) -> bool:
    return isinstance(module, Linear | GroupedLinear) and module.in_features * module.out_features % BLOCK == 0
