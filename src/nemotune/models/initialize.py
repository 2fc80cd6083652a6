"""Fresh weights for pretraining, drawn as megatron-core draws Nemotron-H's (arXiv 2504.03624; the ranges are config.json's).

Normal weights of `initializer_range`; those of projections into the residual stream are divided by the root of how often the blocks add to
it where `rescale_prenorm_residual` says so: once in a block of nemotron_h, twice in one of llama. A is uniform in [1, 16], dt log-uniform in
[time_step_min, time_step_max], D and norms are 1. Taps and bias of the convolution are uniform in +-1 / sqrt(kernel), as PyTorch's.

Transformers' class draws nemotron_h otherwise: A counts up with the heads, out_proj is uniform and no other projection is divided.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from nemotune.models.base import CausalLM
from nemotune.models.config import NemotronHConfig

INTO_RESIDUAL = ("o_proj", "out_proj", "down_proj", "fc2_latent_proj")


@torch.no_grad()
def initialize(model: CausalLM, *, seed: int) -> None:
    """Draw every parameter of `model` in place, the same for the same seed."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(draw(name, tensor.shape, model, seed=seed))


def draw(name: str, shape: Sequence[int], model: CausalLM, *, seed: int) -> Tensor:
    """Fresh values for the parameter or buffer `name` of `shape`: fp32, on torch's default device, whatever else was drawn before."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(zlib.crc32(name.encode(), seed))
    config = model.config
    owner, last = name.split(".")[-2:] if "." in name else ("", name)
    if owner == "conv1d":
        assert isinstance(config, NemotronHConfig)
        bound = config.conv_kernel**-0.5
        return torch.rand(shape, generator=generator).mul(2 * bound).sub(bound)
    if last == "e_score_correction_bias" or last == "bias":
        return torch.zeros(shape)
    if last == "D" or "norm" in owner:
        return torch.ones(shape)
    if last == "A_log":
        return torch.rand(shape, generator=generator).mul(15).add(1).log()
    if last == "dt_bias":
        assert isinstance(config, NemotronHConfig)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.rand(shape, generator=generator).mul(high - low).add(low).exp().clamp(min=config.time_step_floor)
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
    is_rescaled = owner in INTO_RESIDUAL and config.rescale_prenorm_residual
    additions = len(model.blocks) * (1 if isinstance(config, NemotronHConfig) else 2)
    scale = config.initializer_range / (math.sqrt(additions) if is_rescaled else 1)
    return torch.randn(shape, generator=generator).mul(scale)
