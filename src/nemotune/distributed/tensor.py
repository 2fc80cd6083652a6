"""Tensor parallelism: which part of each weight a rank of the `tensor` axis holds. How the ranks meet is `regions.py`.

Mixers (llama: self_attn, mlp) are split by whole heads and norm groups or by width, embeddings and head by rows of the vocabulary. The
rest is held whole: norms of blocks, which every rank computes alike, and within a mixer the router and the latent projections.

That the degree divides the model has been checked (plan/parallel.py). Experts that are divided among ranks which see other tokens
(expert over 1) keep their width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from nemotune.distributed.holding import hold
from nemotune.distributed.world import World
from nemotune.models import CausalLM, LlamaConfig, NemotronHConfig
from nemotune.models.nemotron_h import Mamba2
from nemotune.weights import Layout
from nemotune.weights.layout import Range


@dataclass(frozen=True)
class Share:
    """The part of rank `index` of `degree`."""

    degree: int
    index: int

    def of(self, *segments: int) -> tuple[Range, ...]:
        """An equal part of each of the segments, which lie end to end."""
        starts, parts = accumulate(segments, initial=0), [size // self.degree for size in segments]
        return tuple((start + self.index * part, start + (self.index + 1) * part) for start, part in zip(starts, parts, strict=False))

    def of_heads(self, heads: int, head_dim: int) -> tuple[Range, ...]:
        """Whole key-value heads; where there are fewer than ranks, the one that the queries of this rank attend to."""
        first = heads * self.index // self.degree
        return ((first * head_dim, (first + max(1, heads // self.degree)) * head_dim),)


Split = tuple[int, tuple[Range, ...]]  # a dim, and what is held of it


def arrange(model: CausalLM, world: World) -> None:
    """Shrink what the ranks share to this one's part."""
    if world.degrees.tensor == 1:
        return
    share = Share(world.degrees.tensor, world.index("tensor"))
    hold(model, parts(model, share, with_experts=world.degrees.expert == 1))
    for module in model.modules():
        if isinstance(module, Mamba2):
            heads, groups = module.config.mamba_num_heads, module.config.n_groups
            module.config = replace(module.config, mamba_num_heads=heads // share.degree, n_groups=groups // share.degree)


def parts(model: CausalLM, share: Share, *, with_experts: bool = True) -> dict[str, Layout]:
    """The tensors of the whole `model` that are split, and the part of each that falls to `share`."""
    splits = {
        r"(embeddings|embed_tokens|lm_head)\.weight": (0, share.of(model.config.vocab_size)),
        **PLANS[model.family](model.config, share),
    }
    found = {}
    for name, tensor in model.state_dict().items():
        split = next((split for pattern, split in splits.items() if re.search(rf"\.?\b{pattern}$", name)), None)
        if split and (with_experts or ".mixer.experts." not in name):
            found[name] = Layout.whole(tensor.shape).along(*split)
    return found


def _attention(c: NemotronHConfig | LlamaConfig, share: Share) -> dict[str, Split]:
    queries, key_values = share.of(c.num_attention_heads * c.head_dim), share.of_heads(c.num_key_value_heads, c.head_dim)
    return {r"q_proj\.(weight|bias)": (0, queries), r"[kv]_proj\.(weight|bias)": (0, key_values), r"o_proj\.weight": (1, queries)}


def _nemotron_h(c: NemotronHConfig, share: Share) -> dict[str, Split]:
    inner, heads, of_groups = c.mamba_inner_size, c.mamba_num_heads, c.n_groups * c.ssm_state_size
    shared, routed = share.of(c.moe_shared_expert_intermediate_size), share.of(c.moe_intermediate_size)
    return {
        **_attention(c, share),
        r"in_proj\.(weight|bias)": (0, share.of(inner, inner, of_groups, of_groups, heads)),  # order: [z, x, B, C, dt]
        r"conv1d\.(weight|bias)": (0, share.of(inner, of_groups, of_groups)),
        r"(A_log|D|dt_bias)": (0, share.of(heads)),
        r"mixer\.norm\.weight": (0, share.of(inner)),
        r"out_proj\.weight": (1, share.of(inner)),
        r"mixer\.up_proj\.(weight|bias)": (0, share.of(c.intermediate_size)),
        r"mixer\.down_proj\.weight": (1, share.of(c.intermediate_size)),
        r"shared_experts\.up_proj\.(weight|bias)": (0, shared),
        r"shared_experts\.down_proj\.weight": (1, shared),
        r"mixer\.experts\.up_proj\.weight": (1, routed),
        r"mixer\.experts\.down_proj\.weight": (2, routed),
    }


def _llama(c: LlamaConfig, share: Share) -> dict[str, Split]:
    width = share.of(c.intermediate_size)
    return {**_attention(c, share), r"(gate|up)_proj\.(weight|bias)": (0, width), r"down_proj\.weight": (1, width)}


PLANS: Mapping[str, Callable[[Any, Share], dict[str, Split]]] = {"nemotron_h": _nemotron_h, "llama": _llama}
