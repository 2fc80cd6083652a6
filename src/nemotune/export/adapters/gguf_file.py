"""An adapter as a GGUF file for llama.cpp's `--lora`: A and B in fp32 beside the names of the weights that they change, experts stacked.

llama.cpp (src/llama-adapter.cpp, build_lora_mm and build_lora_mm_id of src/llama-graph.cpp) adds `alpha / rank B A x`, with one alpha for the file, wherever
its graph multiplies through those functions. Where it does not, an adapter would be loaded and change nothing: such modules are refused by name. The
format is that of convert_lora_to_gguf.py, which refuses experts; what the base's tensors are called is in `export/gguf/names.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFReader, GGUFType, GGUFWriter, Keys
from torch import Tensor, nn

from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.export.adapters.opened import Opened
from nemotune.export.adapters.same_scale import same_scale
from nemotune.export.gguf.names import architecture, change_of, gguf_name
from nemotune.export.gguf.plan import header_bytes
from nemotune.export.stream import OutputFile, Part, Plan, bytes_of, in_threads
from nemotune.lora.layers import scale
from nemotune.lora.pairs import Adapter
from nemotune.lora.targets import adaptable_modules
from nemotune.models.base import CausalLM
from nemotune.models.config import NemotronHConfig
from nemotune.models.layers import GroupedLinear

F32 = GGMLQuantizationType.F32
LATENT = ("fc1_latent_proj", "fc2_latent_proj")


@dataclass(frozen=True)
class _Tensor:
    """The `lora_a` or `lora_b` of a weight."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return 4 * math.prod(self.shape)


def plan_for_llama_cpp(opened: Opened) -> Plan[int]:
    """The file. Raises UnsupportedError naming the modules that llama.cpp would leave as they are."""
    _refuse(opened.adapter, opened.model)
    adapter = same_scale(opened.adapter)
    tensors = [tensor for name in adapter.settings for tensor in _pair(name, adapter, opened.model)]
    head = _header(tensors, adapter, opened)
    parts = (Part("header", len(head), lambda: [lambda: head]), *map(_part, tensors))

    def verify(path: Path) -> int:
        _verify(path, tensors)
        return len(tensors)

    return Plan({"format": "gguf-lora", **opened.identity}, (OutputFile("adapter.gguf", parts),), verify=verify, is_file=True)


def _refuse(adapter: Adapter, model: CausalLM) -> None:
    config, kinds = model.config, adaptable_modules(model)
    mixed = isinstance(config, NemotronHConfig) and config.expert_layers
    reasons = {
        "is multiplied without adapters in its graph": [name for name in adapter.settings if name.endswith(LATENT)],
        "is tied to the embeddings, and its file has no tensor for it": [
            name for name in adapter.settings if kinds[name] == "head" and config.tie_word_embeddings
        ],
        "is a dense layer beside experts, which its file has as experts": [
            name for name in adapter.settings if mixed and kinds[name] == "mlp"
        ],
        "has DoRA's magnitudes, which it does not read": list(adapter.magnitudes),
    }
    problems = [f"lora.targets: {names[0]} (one of {len(names)}): {reason}" for reason, names in reasons.items() if names]
    if problems:
        remedy = "llama.cpp would leave them as they are; write a GGUF file of base and adapter instead (`nemotune export gguf`)"
        raise UnsupportedError("\n".join([*problems, remedy]))


def _pair(name: str, adapter: Adapter, model: CausalLM) -> Iterator[_Tensor]:
    """A [..., rank, in] and B [..., out, rank], the rows of B in the file's order; of embeddings A [vocabulary, rank] and B [hidden, rank]."""
    module, rank = model.get_submodule(name), adapter.settings[name].rank
    weight = gguf_name(f"{name}.weight")
    assert weight is not None, f"{name}: an adapted module that llama.cpp has no weight of"
    if isinstance(module, nn.Embedding):
        yield _Tensor(f"{weight}.lora_a", (module.num_embeddings, rank), lambda: adapter.pairs[name][1])
        yield _Tensor(f"{weight}.lora_b", (module.embedding_dim, rank), lambda: adapter.pairs[name][0].T)
        return
    experts = (module.num_experts,) if isinstance(module, GroupedLinear) else ()
    _, change = change_of(weight, (*experts, module.out_features, module.in_features), model.config)
    yield _Tensor(f"{weight}.lora_a", (*experts, rank, module.in_features), lambda: adapter.pairs[name][0])
    yield _Tensor(
        f"{weight}.lora_b",
        (*experts, module.out_features, rank),
        lambda: change(adapter.pairs[name][1]) if change else adapter.pairs[name][1],
    )


def _header(tensors: Sequence[_Tensor], adapter: Adapter, opened: Opened) -> bytes:
    writer = GGUFWriter(None, architecture(opened.model.config))
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, scale(adapter.lora) * adapter.lora.rank)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_dtype=F32)
    return header_bytes(writer)


def _part(tensor: _Tensor) -> Part:
    padding = bytes(-tensor.num_bytes % GGUF_DEFAULT_ALIGNMENT)
    return Part(tensor.name, tensor.num_bytes + len(padding), lambda: [lambda: bytes_of(tensor.values().float()), lambda: padding])


def _verify(path: Path, tensors: Sequence[_Tensor]) -> None:
    """Read the file back. Raises CheckpointError where a name, shape or value is not as it should be."""
    try:
        found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path}: cannot be read back ({error}); nothing was kept. Export again") from error
    wrong = sorted(found.keys() ^ {tensor.name for tensor in tensors})
    if not wrong:
        same = in_threads(lambda tensor: _is_same(found[tensor.name].data, tensor), tensors)
        wrong = [tensor.name for tensor, is_same in zip(tensors, same, strict=True) if not is_same]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} of {len(tensors)} tensors read back are not what was to be written, first {wrong[0]}; nothing was kept. Export again"
        )


def _is_same(data: np.ndarray, tensor: _Tensor) -> bool:
    return data.shape == tensor.shape and data.dtype == np.float32 and np.array_equal(data, tensor.values().float().numpy())
