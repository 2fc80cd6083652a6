"""Safetensors shards as files of a streamed export (`stream.py`): a header, then each tensor piece by piece. What the values are is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from nemotune.export.stream import OutputFile, Part, Piece, bytes_of
from nemotune.weights import TensorInfo, WritePlan
from nemotune.weights.writer import header

TensorPieces = Sequence[Callable[[], Tensor]]  # rows of a tensor in order, in its dtype on disk


def weight_files(plan: WritePlan, pieces: Callable[[str], TensorPieces]) -> tuple[OutputFile, ...]:
    """The shards of `plan`; `pieces` gives a tensor by its name. The index beside them is `weights.writer.write_index`'s."""
    return tuple(
        OutputFile(file, (_head(file, tensors), *(_body(info, pieces) for info in tensors))) for file, tensors in plan.by_file.items()
    )


def _head(file: str, tensors: Sequence[TensorInfo]) -> Part:
    head = header(tensors)
    return Part(f"header of {file}", len(head), lambda: [lambda: head])


def _body(info: TensorInfo, pieces: Callable[[str], TensorPieces]) -> Part:
    return Part(info.name, info.num_bytes, lambda: [_as_bytes(piece, info) for piece in pieces(info.name)])


def _as_bytes(piece: Callable[[], Tensor], info: TensorInfo) -> Piece:
    def made() -> memoryview:
        values = piece()
        assert values.dtype == info.torch_dtype, f"{info.name}: planned {info.torch_dtype}, got {values.dtype}"
        return bytes_of(values)

    return made
