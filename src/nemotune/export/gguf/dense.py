"""A dense layer of a model that also has experts, as experts: llama.cpp's nemotron_h_moe knows no other layers, and fails on files that have them.

The shared expert takes the first units of the layer, the routed experts that a constant router always chooses take the others; what is left
over is zero. The sum is the same, since relu2 acts on each unit alone. No published model needs it; nemotron-tiny does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nemotune.errors import UnsupportedError
from nemotune.models.config import NemotronHConfig

Made = tuple[str, tuple[int, ...], Callable[[], Sequence[Callable[[], Tensor]]]]  # name, shape, pieces


def expert_width(config: NemotronHConfig) -> int:
    """Units of an expert of a dense layer: as many as elsewhere, where they are enough."""
    left = max(0, config.intermediate_size - config.moe_shared_expert_intermediate_size)
    return max(config.moe_intermediate_size, -(-left // config.num_experts_per_tok))


def dense_as_experts(read: Callable[[str], Tensor], config: NemotronHConfig, layer: int) -> Iterator[Made]:
    """The tensors of the layer; `read` gives `up_proj` [I, D] and `down_proj` [D, I]. Raises UnsupportedError where experts are latent."""
    if config.moe_latent_size:
        raise UnsupportedError(
            f"layers_block_type: layer {layer} is a dense MLP beside latent experts, which llama.cpp cannot run; serve this model with vLLM"
        )
    num_experts, used, width = config.n_routed_experts, config.num_experts_per_tok, expert_width(config)
    D, shared = config.hidden_size, config.moe_shared_expert_intermediate_size
    # A router of zeros gives each expert sigmoid(0); the bias has the first of them chosen.
    share = config.routed_scaling_factor * (1 / used if config.norm_topk_prob else 0.5)

    def up_of(expert: int) -> Tensor:
        return _padded(read("up_proj")[shared + expert * width :][:width], width)

    def down_of(expert: int) -> Tensor:
        return _padded(read("down_proj").float().T[shared + expert * width :][:width], width).T / share

    def experts(of: Callable[[int], Tensor], shape: tuple[int, int]) -> Sequence[Callable[[], Tensor]]:
        return [(lambda e=e: of(e) if e < used else torch.zeros(shape)) for e in range(num_experts)]

    name = f"blk.{layer}".__add__
    yield name(".ffn_gate_inp.weight"), (num_experts, D), lambda: [lambda: torch.zeros(num_experts, D)]
    yield name(".exp_probs_b.bias"), (num_experts,), lambda: [lambda: (torch.arange(num_experts) < used).float()]
    yield name(".ffn_up_shexp.weight"), (shared, D), lambda: [lambda: _padded(read("up_proj")[:shared], shared)]
    yield name(".ffn_down_shexp.weight"), (D, shared), lambda: [lambda: _padded(read("down_proj").T[:shared], shared).T]
    yield name(".ffn_up_exps.weight"), (num_experts, width, D), lambda: experts(up_of, (width, D))
    yield name(".ffn_down_exps.weight"), (num_experts, D, width), lambda: experts(down_of, (D, width))


def _padded(rows: Tensor, num_rows: int) -> Tensor:
    """`rows` and as many of zeros as are missing."""
    return torch.cat([rows, rows.new_zeros(num_rows - len(rows), rows.shape[1])])
