"""The optimiser: AdamW with decoupled weight decay (arXiv 1711.05101), or its 8-bit form (arXiv 2110.02861) from a library that runs here.

Decayed are the matrices: embeddings, head and router among them, as in megatron-core, and both factors of an adapter. Norms, biases, the
per-head parameters of Mamba and DoRA's magnitudes are not, nor are convolutions, which megatron-core decays. LoRA+ (arXiv 2402.12354) is a
matter of groups: that of the B has a multiple of the rate.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from nemotune.errors import UnsupportedError
from nemotune.recipe import Train

FASTER = (".lora_B", ".lora_magnitude_vector")  # as in PEFT's create_loraplus_optimizer


def make_optimizer(parameters: Mapping[str, nn.Parameter], train: Train, *, plus_ratio: float | None = None) -> Optimizer:
    """The optimiser of `train` over named parameters; with `plus_ratio` the rate of each B is so many times that of its A.

    Raises UnsupportedError where its library is missing.
    """
    kinds: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        is_divided = isinstance(p, DTensor)  # by FSDP: one fused call takes no mixture
        kinds.setdefault((not _is_decayed(name, p), plus_ratio is not None and name.endswith(FASTER), is_divided), []).append(p)
    groups: list[dict[str, Any]] = []
    for (plain, faster, _), held in sorted(kinds.items()) or [((True, False, False), [])]:  # a pipeline stage may train nothing
        ratio = {"lr_ratio": plus_ratio} if faster else {}
        groups.append({"params": held, "weight_decay": 0.0 if plain else train.weight_decay, **ratio})
    if train.optimizer == "adamw":
        optimizer: Optimizer = AdamW(groups, lr=train.learning_rate, betas=train.betas, eps=train.eps, fused=True)
    else:
        optimizer = _adamw_8bit(groups, train, on_cuda=next(iter(parameters.values())).is_cuda)
    set_learning_rate(optimizer, train.learning_rate)
    return optimizer


def describe(optimizer: Optimizer) -> str | None:
    """Which library's 8-bit form was found, why, and what it costs; None for plain AdamW, which needs no word."""
    library = type(optimizer).__module__.partition(".")[0]
    if library == "bitsandbytes":
        return "train.optimizer: bitsandbytes' 8-bit AdamW"
    if library == "torchao":
        on_cuda = optimizer.param_groups[0]["params"][0].is_cuda
        why = "bitsandbytes is not installed" if on_cuda else "bitsandbytes needs CUDA"
        return f"train.optimizer: torchao's 8-bit AdamW ({why}); the first step compiles, which takes about half a minute"
    return None


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Give every group the rate, times its own ratio where it has one. Rates that are tensors stay so."""
    for group in optimizer.param_groups:
        rate = learning_rate * group.get("lr_ratio", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith("conv1d.weight")


def _adamw_8bit(groups: list[dict[str, Any]], train: Train, *, on_cuda: bool) -> Optimizer:
    """bitsandbytes' where there is CUDA, else torchao's, whose first step compiles."""
    if on_cuda:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            pass
        else:
            return AdamW8bit(groups, lr=train.learning_rate, betas=train.betas, eps=train.eps)
    try:
        from torchao.optim import AdamW8bit as TorchAdamW8bit
    except ImportError as error:
        missing = "bitsandbytes or torchao, and neither is installed" if on_cuda else "torchao on a CPU, and it is not installed"
        raise UnsupportedError(
            f"train.optimizer: adamw_8bit needs {missing}; `pip install 'nemotune[cuda]'`, or train.optimizer=adamw"
        ) from error
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch.compile looks for it
    if not on_cuda and shutil.which(compiler) is None:
        raise UnsupportedError(
            f"train.optimizer: adamw_8bit on a CPU is compiled, and there is no C++ compiler {compiler} (the variable CXX may name one); "
            "install it, or train.optimizer=adamw"
        )
    return TorchAdamW8bit(groups, lr=train.learning_rate, betas=train.betas, eps=train.eps)
