"""Which type each tensor of a file gets: llama-quantize's choice for the whole file's type, with its fallbacks for rows that no block divides.

From llama.cpp's src/llama-quant.cpp (ggml 0.25.3), for what these architectures have. How values are packed is in `quants/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFWriter, LlamaFileType

from nemotune.errors import UnsupportedError, did_you_mean
from nemotune.export.gguf.names import GGUFTensor
from nemotune.export.gguf.quants import row_bytes
from nemotune.models.config import LlamaConfig, NemotronHConfig

F32, F16, BF16, Q8_0, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K = (
    GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
)  # fmt: skip
KINDS = {
    "f32": (F32, LlamaFileType.ALL_F32), "f16": (F16, LlamaFileType.MOSTLY_F16), "bf16": (BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Q8_0, LlamaFileType.MOSTLY_Q8_0), "q5_k_m": (Q5_K, LlamaFileType.MOSTLY_Q5_K_M), "q4_k_m": (Q4_K, LlamaFileType.MOSTLY_Q4_K_M),
}  # fmt: skip
FALLBACK = {Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}  # blocks of 32 values where a row is no multiple of 256
ALWAYS_F32 = ("ffn_gate_inp.weight", "ssm_conv1d.weight", "_norm.weight")


@dataclass(frozen=True)
class Fallback:
    """Parameters whose rows llama.cpp's own choice of type does not divide, and of how many."""

    numel: int
    of: int

    @property
    def share(self) -> float:
        return self.numel / self.of


def require_kind(kind: str) -> str:
    """`kind` in lower case, where it is one. Raises UnsupportedError."""
    if (kind := kind.lower()) not in KINDS:
        raise UnsupportedError(f"--type: got '{kind}', expected one of {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")
    return kind


def types_of(
    tensors: Sequence[GGUFTensor], config: NemotronHConfig | LlamaConfig, kind: str
) -> tuple[dict[str, GGMLQuantizationType], Fallback]:
    """The type of each tensor by its name; `tensors` in the file's order."""
    base = KINDS[kind][0]
    is_quantised = base not in (F32, F16, BF16)
    chosen = _mixture(tensors, config, kind) if is_quantised else {}
    types, fallen = {}, 0
    for tensor in tensors:
        if len(tensor.shape) < 2 or not tensor.name.endswith(".weight") or tensor.name.endswith(ALWAYS_F32):
            types[tensor.name] = F32
            continue
        wanted = chosen.get(tensor.name, base)
        types[tensor.name] = _that_fits(wanted, tensor.shape[-1])
        fallen += tensor.numel if types[tensor.name] != wanted else 0
    return types, Fallback(fallen, sum(tensor.numel for tensor in tensors))


def num_bytes_of(tensor: GGUFTensor, kind: GGMLQuantizationType) -> int:
    """What the tensor takes in the file; the next one begins at `aligned` of its end."""
    return tensor.numel // tensor.shape[-1] * row_bytes(kind.name, tensor.shape[-1])


def aligned(num_bytes: int) -> int:
    """The next place for a tensor."""
    return GGUFWriter.ggml_pad(num_bytes, GGUF_DEFAULT_ALIGNMENT)


def _that_fits(wanted: GGMLQuantizationType, row_length: int) -> GGMLQuantizationType:
    if row_length % GGML_QUANT_SIZES[wanted][0] == 0:
        return wanted
    smaller = FALLBACK.get(wanted, wanted)
    return smaller if row_length % GGML_QUANT_SIZES[smaller][0] == 0 else F16


def _mixture(tensors: Sequence[GGUFTensor], config: NemotronHConfig | LlamaConfig, kind: str) -> Mapping[str, GGMLQuantizationType]:
    """The tensors whose type is not the file's own."""
    num_experts = config.n_routed_experts if isinstance(config, NemotronHConfig) else 0
    has_more_bits = kind in ("q4_k_m", "q5_k_m")
    weights, by_part = [tensor for tensor in tensors if tensor.name.endswith(".weight")], {}
    for tensor in weights:
        by_part.setdefault(tensor.name.split(".")[-2], []).append(tensor)
    chosen = {}
    for index, tensor in enumerate(values := by_part.get("attn_v", [])):
        if has_more_bits and _gets_more_bits(index, len(values)):
            chosen[tensor.name] = Q6_K
        elif kind == "q4_k_m" and _is_70b(config):
            chosen[tensor.name] = Q5_K
    for index, tensor in enumerate(tensor for tensor in weights if ".ffn_down" in tensor.name):
        if has_more_bits and _gets_more_bits(tensor.block if num_experts > 1 else index, config.num_layers):
            chosen[tensor.name] = Q6_K
    if num_experts == 8:
        chosen |= {tensor.name: Q8_0 for part in ("attn_v", "attn_k") for tensor in by_part.get(part, [])}
        if kind == "q4_k_m":
            chosen |= {tensor.name: Q5_K for tensor in by_part.get("attn_output", [])}
    (output,) = by_part.get("output") or by_part["token_embd"]  # the embeddings are the head where there is no other
    if has_more_bits:
        chosen[output.name] = Q6_K if output.shape[-1] % 256 == 0 else Q8_0
    return chosen


def _gets_more_bits(index: int, count: int) -> bool:
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _is_70b(config: NemotronHConfig | LlamaConfig) -> bool:
    return isinstance(config, LlamaConfig) and config.num_layers == 80 and config.num_attention_heads != config.num_key_value_heads
