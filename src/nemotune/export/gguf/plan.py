"""A GGUF file of base + adapter as a streamed export: the header, then tensor by tensor, some rows at a time, never the whole model.

Values go the way that convert_hf_to_gguf.py and llama-quantize take them (checkpoint's dtype, f16, quantised), so the tensors' bytes are theirs.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Names are in `names.py`, types in `types.py`, keys in `metadata.py` and
`tokenizer.py`, packing in `quants/`, what is read back in `structure.py`,
what llama.cpp makes of it in `check.py`.
"""

from __future__ import annotations

import contextlib
import io
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.gguf_writer import WriterState
from torch import Tensor

from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.export.gguf.check import Checked, check
from nemotune.export.gguf.metadata import add_metadata
from nemotune.export.gguf.names import GGUFTensor, architecture, gguf_tensors
from nemotune.export.gguf.quants import quantize
from nemotune.export.gguf.structure import ReadBack, check_structure
from nemotune.export.gguf.tokenizer import add_tokenizer, stop_tokens
from nemotune.export.gguf.types import KINDS, Fallback, aligned, num_bytes_of, require_kind, types_of
from nemotune.export.stream import OutputFile, Part, Piece, Plan
from nemotune.export.tuned import Tuned
from nemotune.models.config import NemotronHConfig

TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Verified:
    """What was found in the file that was written, and what llama.cpp computed from it."""

    read_back: ReadBack
    run: Checked


def plan_gguf(tuned: Tuned, kind: str, *, name: str | None = None) -> Plan[Verified]:
    """The file of type `kind`; `name` is the model's, its directory's otherwise.

    Raises UnsupportedError for what llama.cpp could not run or would tokenise otherwise.
    """
    _require_runnable(tuned)
    tensors = gguf_tensors(tuned)
    types, _ = types_of(tensors, tuned.model.config, require_kind(kind))
    head = _header(tuned, tensors, types, kind, name=name)
    parts = (Part("header", len(head), lambda: [lambda: head]), *(_part(tensor, types[tensor.name]) for tensor in tensors))

    def verify(path: Path) -> Verified:
        return Verified(check_structure(path, head, tensors, types), check(path, tuned, kind))

    identity = {"format": "gguf", "kind": kind, "name": name, **tuned.identity}
    return Plan(identity, (OutputFile("model.gguf", parts),), verify=verify, is_file=True)


def fallback(tuned: Tuned, kind: str) -> Fallback:
    """How much of the model no block of the type divides, and so takes a wider one."""
    return types_of(gguf_tensors(tuned), tuned.model.config, require_kind(kind))[1]


def _require_runnable(tuned: Tuned) -> None:
    config = tuned.model.config
    if not isinstance(config, NemotronHConfig):
        return
    if missing := {"mamba", "attention"} - set(config.block_types):
        raise UnsupportedError(
            f"{tuned.directory}: layers_block_type: no {' and no '.join(sorted(missing))} layer; llama.cpp runs hybrids that have both. Serve this model with vLLM"
        )
    if config.time_step_limit != (0.0, math.inf):
        raise UnsupportedError(
            f"{tuned.directory}: time_step_limit: got {list(config.time_step_limit)}, expected [0, Infinity]: llama.cpp does not clamp dt and would "
            "answer otherwise. Serve this model with vLLM"
        )


def _header(tuned: Tuned, tensors: Sequence[GGUFTensor], types: dict[str, GGMLQuantizationType], kind: str, *, name: str | None) -> bytes:
    """Magic, keys, and where each tensor lies, up to the first tensor's first byte."""
    writer, config = GGUFWriter(None, architecture(tuned.model.config)), tuned.model.config
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), num_bytes_of(tensor, types[tensor.name]), raw_dtype=types[tensor.name]
        )
    with _named_if_unfit(tuned.directory):
        add_metadata(writer, config, tuned.directory, KINDS[kind][1], name=name)
    own = tuned.adapter_dir and tuned.adapter_dir / TEMPLATE
    template = own.read_text(encoding="utf-8") if own and own.is_file() else None
    add_tokenizer(writer, tuned.directory, config.vocab_size, template=template, stops=stop_tokens(tuned.adapter_dir, tuned.directory))
    with _named_if_unfit(tuned.directory):
        return header_bytes(writer)


@contextlib.contextmanager
def _named_if_unfit(directory: Path) -> Iterator[None]:
    """The `gguf` package takes a model's card and sampling settings as they are: make what it then stumbles over a CheckpointError."""
    try:
        yield
    except (TypeError, ValueError, RecursionError, struct.error, yaml.YAMLError) as error:
        told = str(error).splitlines()[0]
        raise CheckpointError(
            f"{directory}: README.md or generation_config.json: a GGUF file has no place for what one of them says ({told}); mend it, or move it away"
        ) from error


def header_bytes(writer: GGUFWriter) -> bytes:
    """What was added to `writer`, up to the first tensor's first byte: it writes into memory, since the file is ours to write."""
    out = io.BytesIO()
    writer.fout, writer.state = [out], WriterState.EMPTY  # type: ignore[list-item]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return _padded(out.getvalue())


def _part(tensor: GGUFTensor, kind: GGMLQuantizationType) -> Part:
    """The tensor's bytes, up to where the next begins."""
    num_bytes = num_bytes_of(tensor, kind)
    padding = bytes(aligned(num_bytes) - num_bytes)

    def pieces() -> list[Piece]:
        made: list[Piece] = [partial(_packed, piece, tensor, kind) for piece in tensor.pieces()]
        return [*made, lambda: padding] if padding else made

    return Part(tensor.name, num_bytes + len(padding), pieces)


def _packed(piece: Callable[[], Tensor], tensor: GGUFTensor, kind: GGMLQuantizationType) -> memoryview:
    try:
        return memoryview(quantize(piece().reshape(-1, tensor.shape[-1]), kind.name).reshape(-1))
    except CheckpointError as error:
        raise CheckpointError(f"{tensor.name}: {error}") from error


def _padded(data: bytes) -> bytes:
    return data + bytes(aligned(len(data)) - len(data))
