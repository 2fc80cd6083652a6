"""The optimiser: AdamW with decoupled weight decay (arXiv 1711.05101), or its 8-bit form (arXiv 2110.02861) from a library that runs here.

Norms, biases and the per-head parameters of Mamba are never decayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from nemotune.errors import UnsupportedError
from nemotune.recipe import Train


def make_optimizer(parameters: Mapping[str, nn.Parameter], train: Train) -> Optimizer:
    """The optimiser of `train` over named parameters. Raises UnsupportedError where its library is missing."""
    decayed = [p for name, p in parameters.items() if _is_decayed(name, p)]
    plain = [p for name, p in parameters.items() if not _is_decayed(name, p)]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if train.optimizer == "adamw":
        return AdamW(groups, lr=train.learning_rate, betas=train.betas, fused=True)
    return _adamw_8bit(groups, train, on_cuda=next(iter(parameters.values())).is_cuda)


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith("conv1d.weight")


def _adamw_8bit(groups: list[dict[str, Any]], train: Train, *, on_cuda: bool) -> Optimizer:
    """bitsandbytes where there is CUDA, else torchao, whose first step compiles (half a minute, and a C++ compiler on the CPU)."""
    if on_cuda:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            pass
        else:
            return AdamW8bit(groups, lr=train.learning_rate, betas=train.betas)
    try:
        from torchao.optim import AdamW8bit as TorchAdamW8bit
    except ImportError as error:
        raise UnsupportedError(
            "train.optimizer: adamw_8bit needs bitsandbytes (CUDA) or torchao, neither is installed; "
            "`pip install 'nemotune[cuda]'`, or train.optimizer=adamw"
        ) from error
    return TorchAdamW8bit(groups, lr=torch.tensor(train.learning_rate), betas=train.betas)
