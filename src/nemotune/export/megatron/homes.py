"""Which rows of which Hugging Face tensors each Megatron tensor is made of: one table per family, used in both directions and for adapters.

Megatron fuses (q, k, v; gate and up), splits (Mamba's projection and convolution), stacks (experts; the layers of a dense model) and
renames, and all of that moves whole rows (https://github.com/NVIDIA-NeMo/Megatron-Bridge). Names on the left are the checkpoint's own;
biases of linear layers have no place in Megatron's Nemotron and Llama models. It knows names and sizes, never a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from nemotune.export.megatron.rows import Rows
from nemotune.models.config import LlamaConfig, NemotronHConfig
from nemotune.models.config_json import BLOCK_TYPES, PATTERN_KEYS

Config = NemotronHConfig | LlamaConfig


@dataclass(frozen=True)
class Home:
    """A Megatron tensor: the rows of each of its entries. `stacked` ones have a dim for the entries in front, others have one entry."""

    name: str
    entries: tuple[tuple[Rows, ...], ...]
    stacked: bool = False

    @property
    def names(self) -> set[str]:
        """The Hugging Face tensors that it is made of."""
        return {rows.name for entry in self.entries for rows in entry}


Op = Callable[[str, str, Config], Iterator[Home]]  # (name there, name here, config); of a weight, a bias or the B of an adapter


def same(theirs: str, ours: str, config: Config) -> Iterator[Home]:
    yield Home(theirs, ((Rows(ours),),))


def in_parts(parts: str) -> Op:
    """A tensor of its own for each part, in this order."""

    def split(theirs: str, ours: str, config: Config) -> Iterator[Home]:
        assert isinstance(config, NemotronHConfig)
        inner, state = config.mamba_inner_size, config.n_groups * config.ssm_state_size
        sizes, at = {"z": inner, "x": inner, "B": state, "C": state, "dt": config.mamba_num_heads}, 0
        for part in parts.split():
            yield Home(f"{theirs}.{part}", ((Rows(ours, at, sizes[part]),),))
            at += sizes[part]

    return split


def by_groups(theirs: str, ours: str, config: Config) -> Iterator[Home]:
    """Per group of queries its query heads, then its key, then its value."""
    q, k, v = (ours.replace("qkv", which) for which in "qkv")
    groups, one = config.num_key_value_heads, config.head_dim
    queries = config.num_attention_heads // groups * one
    rows = [(Rows(q, g * queries, queries), Rows(k, g * one, one), Rows(v, g * one, one)) for g in range(groups)]
    yield Home(theirs, (tuple(each for group in rows for each in group),))


def gate_then_up(theirs: str, ours: str, config: Config) -> Iterator[Home]:
    names = (ours.replace("gate_up", which) for which in ("gate", "up"))
    yield Home(theirs, (tuple(Rows(name, 0, config.intermediate_size) for name in names),))


def by_expert(theirs: str, ours: str, config: Config) -> Iterator[Home]:
    assert isinstance(config, NemotronHConfig)
    named = ours.replace(".experts.", ".experts.{}.")
    yield Home(theirs, tuple((Rows(named.format(expert)),) for expert in range(config.n_routed_experts)), stacked=True)


# Block type -> (the linear module here, there, how its rows move). `qkv` and `gate_up` stand for each of them.
LINEAR: dict[str, tuple[tuple[str, str, Op], ...]] = {
    "mamba": (("mixer.in_proj", "mixer.in_proj", in_parts("z x B C dt")), ("mixer.out_proj", "mixer.out_proj", same)),
    "attention": (("mixer.qkv_proj", "self_attention.linear_qkv", by_groups), ("mixer.o_proj", "self_attention.linear_proj", same)),
    "mlp": (("mixer.up_proj", "mlp.linear_fc1", same), ("mixer.down_proj", "mlp.linear_fc2", same)),
    "moe": (
        ("mixer.experts.up_proj", "mlp.experts.experts.linear_fc1", by_expert),
        ("mixer.experts.down_proj", "mlp.experts.experts.linear_fc2", by_expert),
        ("mixer.shared_experts.up_proj", "mlp.shared_experts.linear_fc1", same),
        ("mixer.shared_experts.down_proj", "mlp.shared_experts.linear_fc2", same),
        ("mixer.fc1_latent_proj", "mlp.fc1_latent_proj", same),
        ("mixer.fc2_latent_proj", "mlp.fc2_latent_proj", same),
    ),
    "llama": (
        ("self_attn.qkv_proj", "self_attention.linear_qkv", by_groups),
        ("self_attn.o_proj", "self_attention.linear_proj", same),
        ("mlp.gate_up_proj", "mlp.linear_fc1", gate_then_up),
        ("mlp.down_proj", "mlp.linear_fc2", same),
    ),
}
OTHER: dict[str, tuple[tuple[str, str, Op], ...]] = {
    "mamba": (
        ("norm.weight", "mixer.in_proj.layer_norm_weight", same),
        *((name, name, same) for name in ("mixer.A_log", "mixer.D", "mixer.dt_bias", "mixer.norm.weight")),
        *((name, name, in_parts("x B C")) for name in ("mixer.conv1d.weight", "mixer.conv1d.bias")),
    ),
    "attention": (("norm.weight", "self_attention.linear_qkv.layer_norm_weight", same),),
    "mlp": (("norm.weight", "mlp.linear_fc1.layer_norm_weight", same),),
    "moe": (
        ("norm.weight", "pre_mlp_layernorm.weight", same),
        ("mixer.gate.weight", "mlp.router.weight", same),
        ("mixer.gate.e_score_correction_bias", "mlp.router.expert_bias", same),
    ),
    "llama": (
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight", same),
        ("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", same),
    ),
}
EMBEDDINGS, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
FINAL_NORM, FINAL_LAYERNORM = "decoder.final_norm.weight", "decoder.final_layernorm.weight"  # hybrid, dense
ENDS = {
    "nemotron_h": ((EMBEDDINGS, "backbone.embeddings.weight"), (FINAL_NORM, "backbone.norm_f.weight")),
    "llama": ((EMBEDDINGS, "model.embed_tokens.weight"), (FINAL_LAYERNORM, "model.norm.weight")),
}
FIRST_OF_MTP, LAST_OF_MTP = ("eh_proj.weight", "enorm.weight", "hnorm.weight"), ("final_layernorm.weight",)
BY_LAYER = re.compile(r"decoder\.layers\.\d+\.")  # not stacked
EXPERT_BIAS = ".router.expert_bias"  # fp32 in Megatron, whatever the checkpoint's dtype
WITHOUT_EXTRA_STATE = ("word_embeddings", "router", "conv1d", "mixer.norm")  # no modules of Transformer Engine


def homes(config: Config, *, mtp_depth: int = 0, one_by_one: bool = False) -> list[Home]:
    """Every Megatron tensor that a model of `config` may have: of those with biases or latent projections, whether it has them or not.

    Dense models stack their layers unless `one_by_one`. `mtp_depth`: how many times the MTP pattern is repeated.
    """
    found = [Home(theirs, ((Rows(ours),),)) for theirs, ours in ENDS[family(config)]]
    if not config.tie_word_embeddings:
        found.append(Home(HEAD, ((Rows("lm_head.weight"),),)))
    if isinstance(config, LlamaConfig):
        layers = [list(_of_block("llama", f"decoder.layers.{i}", f"model.layers.{i}", config)) for i in range(config.num_layers)]
        return [*found, *(chain(*layers) if one_by_one else map(_stack, zip(*layers, strict=True)))]
    for i, block_type in enumerate(config.block_types):
        found += _of_block(block_type, f"decoder.layers.{i}", f"backbone.layers.{i}", config)
    return found + list(_of_mtp(config, mtp_depth))


def linear_homes(block: str, theirs: str, ours: str, config: Config, suffix: str) -> Iterator[tuple[str, list[Home]]]:
    """(name of the linear module there, homes of its tensor `suffix`) for each one of a block; `suffix` follows the name here and there."""
    for name, their_name, op in LINEAR[block]:
        yield f"{theirs}.{their_name}", list(op(f"{theirs}.{their_name}{suffix}", f"{ours}.{name}{suffix}", config))


def extra_states(found: Iterable[Home]) -> Iterator[str]:
    """The names of the empty entries that Megatron asks for beside the tensors of its linear modules and norms."""
    modules: dict[str, int] = {}
    for home in found:
        module, _, last = re.sub(r"\.(z|x|B|C|dt)$", "", home.name).rpartition(".")
        if last in ("weight", "layer_norm_weight") and not module.endswith(WITHOUT_EXTRA_STATE):
            modules[module] = len(home.entries)
    for module, count in modules.items():
        yield from (f"{module}._extra_state/shard_{i}_{count}" for i in range(count))


def mtp_depth(names: Iterable[str], config: Config) -> int:
    """How many repetitions of the MTP pattern the tensors of a Hugging Face directory belong to."""
    flat = [int(match[1]) for name in names if (match := re.match(r"mtp\.layers\.(\d+)\.", name))]
    return -(-(max(flat) + 1) // len(mtp_pattern(config))) if flat and mtp_pattern(config) else 0


def mtp_depth_of_megatron(names: Iterable[str]) -> int:
    """The same of a Megatron checkpoint."""
    return max((int(match[1]) + 1 for name in names if (match := re.match(r"mtp\.layers\.(\d+)\.", name))), default=0)


def mtp_pattern(config: Config) -> tuple[str, ...]:
    """The block types of one MTP layer."""
    spelled = config.raw.get("mtp_hybrid_override_pattern") or config.raw.get("mtp_layers_block_type")
    if not spelled:  # `MEM*E/*E`: behind the slash
        pattern = next((config.raw[key] for key in PATTERN_KEYS if isinstance(config.raw.get(key), str)), "")
        spelled = pattern.partition("/")[2].partition("/")[0]
    return tuple(BLOCK_TYPES[symbol] for symbol in spelled if symbol in BLOCK_TYPES)


def family(config: Config) -> str:
    return "llama" if isinstance(config, LlamaConfig) else "nemotron_h"


def _of_block(block: str, theirs: str, ours: str, config: Config) -> Iterator[Home]:
    for _, of_module in linear_homes(block, theirs, ours, config, ".weight"):
        yield from of_module
    for name, their_name, op in OTHER[block]:
        yield from op(f"{theirs}.{their_name}", f"{ours}.{name}", config)


def _of_mtp(config: Config, depth: int) -> Iterator[Home]:
    """Flat there, nested here: `mtp.layers.{outer * L + inner}` of L blocks; what lies beside them belongs to the first or the last."""
    pattern = mtp_pattern(config)
    for outer in range(depth):
        theirs, first = f"mtp.layers.{outer}", outer * len(pattern)
        for inner, block_type in enumerate(pattern):
            yield from _of_block(block_type, f"{theirs}.mtp_model_layer.layers.{inner}", f"mtp.layers.{first + inner}", config)
        yield from (Home(f"{theirs}.{name}", ((Rows(f"mtp.layers.{first}.{name}"),),)) for name in FIRST_OF_MTP)
        last = first + len(pattern) - 1
        yield from (Home(f"{theirs}.{name}", ((Rows(f"mtp.layers.{last}.{name}"),),)) for name in LAST_OF_MTP)


def _stack(layers: tuple[Home, ...]) -> Home:
    """The homes of one tensor of all layers as one: `decoder.layers.3.mlp...` is entry 3 of `decoder.layers.mlp...`."""
    name = layers[0].name.replace("decoder.layers.0.", "decoder.layers.")
    return replace(layers[0], name=name, entries=tuple(layer.entries[0] for layer in layers), stacked=True)
