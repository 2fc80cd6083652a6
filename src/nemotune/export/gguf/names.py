"""Which tensors a GGUF file has, in llama.cpp's names, shapes and order, and where each comes from.

A name that llama.cpp has no place for is an error. Which bits hold the values is in `types.py`; the names are those of llama.cpp's
src/llama-arch.cpp, the changes of values those of its convert_hf_to_gguf.py (ggml 0.25.3).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nemotune.errors import UnsupportedError
from nemotune.export.gguf.dense import dense_as_experts
from nemotune.export.tuned import Tuned
from nemotune.models.config import LlamaConfig, NemotronHConfig
from nemotune.models.disk_names import HEAD, disk_pieces, tensors_of
from nemotune.ops.rope import Llama3Scaling

Pieces = Callable[[], Sequence[Callable[[], Tensor]]]

OUTSIDE_BLOCKS = {
    "backbone.embeddings.weight": "token_embd.weight", "model.embed_tokens.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight",
}  # fmt: skip
IN_BLOCKS = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight", "mixer.out_proj.weight": "ssm_out.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight", "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.A_log": "ssm_a", "mixer.D": "ssm_d", "mixer.dt_bias": "ssm_dt.bias", "mixer.norm.weight": "ssm_norm.weight",
    "mixer.gate.weight": "ffn_gate_inp.weight", "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mixer.experts.up_proj.weight": "ffn_up_exps.weight", "mixer.experts.down_proj.weight": "ffn_down_exps.weight",
    "mixer.shared_experts.up_proj.weight": "ffn_up_shexp.weight", "mixer.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "mixer.fc1_latent_proj.weight": "ffn_latent_down.weight", "mixer.fc2_latent_proj.weight": "ffn_latent_up.weight",
    "input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
    **{f"{mixer}.{short}_proj.{last}": f"attn_{name}.{last}" for mixer in ("mixer", "self_attn") for last in ("weight", "bias")
       for short, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))},
    **{f"{mlp}.{name}_proj.{last}": f"ffn_{name}.{last}" for mlp in ("mixer", "mlp") for last in ("weight", "bias") for name in ("gate", "up", "down")},
}  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of the file; `shape` has rows last but one, as torch has it. `pieces` makes its values in order, each call some of them."""

    name: str
    shape: tuple[int, ...]
    pieces: Pieces

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def block(self) -> int:
        """The block that it belongs to, or -1."""
        match = re.match(r"blk\.(\d+)\.", self.name)
        return int(match[1]) if match else -1


def architecture(config: NemotronHConfig | LlamaConfig) -> str:
    """llama.cpp's name of the architecture. What a config.json says of experts that no layer has does not matter."""
    if isinstance(config, LlamaConfig):
        return "llama"
    return "nemotron_h_moe" if config.expert_layers else "nemotron_h"


def gguf_tensors(tuned: Tuned) -> list[GGUFTensor]:
    """The tensors in the order of llama-quantize: by block, then by name. Raises UnsupportedError naming those that llama.cpp could not use."""
    config, parameters, on_disk = tuned.model.config, tensors_of(tuned.model), names_on_disk(tuned)
    made, unknown = _rope_factors(config), []
    mixed = isinstance(config, NemotronHConfig) and config.expert_layers
    for parameter, values in parameters.items():
        name = gguf_name(parameter)
        if name is None:
            unknown.append(parameter)
        elif not (mixed and _is_dense(name)):
            shape, change = change_of(name, tuple(values.shape), config)
            made.append(GGUFTensor(name, shape, partial(_pieces, tuned, on_disk[parameter], change)))
    if unknown:
        raise UnsupportedError(
            f"{tuned.directory}: llama.cpp's {architecture(config)} has no place for {len(unknown)} tensors, first {unknown[0]}; serve this model with vLLM"
        )
    if mixed:
        assert isinstance(config, NemotronHConfig)
        for layer in (index for index, kind in enumerate(config.block_types) if kind == "mlp"):
            made += [GGUFTensor(*dense) for dense in dense_as_experts(partial(_read_dense, tuned, on_disk, layer), config, layer)]
    if isinstance(config, NemotronHConfig) and not config.use_conv_bias:
        biases = [
            (tensor.name.replace(".weight", ".bias"), tensor.shape[0]) for tensor in made if tensor.name.endswith("ssm_conv1d.weight")
        ]
        made += [GGUFTensor(name, (channels,), partial(_zeros, channels)) for name, channels in biases]  # llama.cpp dies without one
    return sorted(made, key=lambda tensor: (tensor.block, tensor.name))


def _zeros(channels: int) -> list[Callable[[], Tensor]]:
    return [partial(torch.zeros, channels)]


def left_out(tuned: Tuned) -> list[str]:
    """What lies in the checkpoint and not in the file: multi-token prediction, and a head that is a copy."""
    used = {name for names in names_on_disk(tuned).values() for name in names}
    return sorted(name for name in tuned.infos if name not in used)


def _read_dense(tuned: Tuned, on_disk: Mapping[str, Sequence[str]], layer: int, module: str) -> Tensor:
    (name,) = on_disk[f"backbone.layers.{layer}.mixer.{module}.weight"]
    return tuned.read(name)


def names_on_disk(tuned: Tuned) -> dict[str, list[str]]:
    """Parameter -> the tensors on disk that it is made of, in order."""
    names: dict[str, list[str]] = {}
    for disk_name, (parameter, _) in disk_pieces(tuned.model):
        if not (disk_name == HEAD and parameter != HEAD):
            names.setdefault(parameter, []).append(disk_name)
    return names


def gguf_name(parameter: str) -> str | None:
    """What llama.cpp calls it, None where it has no place for it."""
    if parameter in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[parameter]
    match = re.fullmatch(r"(?:backbone|model)\.layers\.(\d+)\.(.+)", parameter)
    return f"blk.{match[1]}.{IN_BLOCKS[match[2]]}" if match and match[2] in IN_BLOCKS else None


def _is_dense(name: str) -> bool:
    return re.search(r"\.ffn_(up|down)\.", name) is not None


Change = Callable[[Tensor], Tensor]


def change_of(name: str, shape: tuple[int, ...], config: NemotronHConfig | LlamaConfig) -> tuple[tuple[int, ...], Change | None]:
    """The shape in the file, and what makes the whole tensor's values so; None where they stay as they are."""
    last = name.split(".", 2)[-1]
    if isinstance(config, NemotronHConfig):
        if last == "ssm_a":
            return (*shape, 1), lambda A_log_H: -torch.exp(A_log_H.float())
        if last == "ssm_d":
            return (*shape, 1), None
        if last == "ssm_conv1d.weight":
            return (shape[0], shape[2]), None  # [C, 1, K]
        if last == "ssm_norm.weight":
            return (config.n_groups, shape[0] // config.n_groups), None
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(last.split(".")[0])
    return shape, heads and partial(_interleaved, num_heads=heads)


def _interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from (first halves, second halves) to pairs, which is how llama.cpp's llama rotates.

    Its hybrids do not rotate, and their files have the rows in this order all the same: adapters converted by others are made for it.
    """
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _pieces(tuned: Tuned, names: Sequence[str], change: Change | None) -> list[Callable[[], Tensor]]:
    if change is None:
        return [piece for name in names for piece in tuned.pieces(name)]
    (name,) = names
    return [lambda: change(tuned.read(name))]


def _rope_factors(config: NemotronHConfig | LlamaConfig) -> list[GGUFTensor]:
    """Llama 3's scaling of RoPE: what each frequency is divided by."""
    if not isinstance(config, LlamaConfig) or not isinstance(config.rope_scaling, Llama3Scaling):
        return []
    return [GGUFTensor("rope_freqs.weight", (config.head_dim // 2,), lambda: [partial(_llama3_factors, config, config.rope_scaling)])]


def _llama3_factors(config: LlamaConfig, scaling: Llama3Scaling) -> Tensor:
    """In the arithmetic of convert_hf_to_gguf.py: frequencies in fp32, the rest in fp64, so that the bytes are equal."""
    factors, low, high, context = (
        scaling.factor,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position_embeddings,
    )
    freqs = 1.0 / (config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim))
    found = []
    for freq in freqs:
        wavelength = 2 * math.pi / freq
        if wavelength < context / high:
            found.append(1)
        elif wavelength > context / low:
            found.append(factors)
        else:
            smooth = (context / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factors + smooth))
    return torch.tensor(found, dtype=torch.float32)
