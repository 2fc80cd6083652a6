"""What a process gives to others and takes from them: calls and bytes of each kind of collective, as PyTorch's dispatcher sees them.

Bytes are those of the tensor that a collective is about: what is added up (all_reduce, reduce_scatter), what is gathered (all_gather), what is
handed out (all_to_all, send). What then goes over a wire depends on the algorithm: a ring moves 2 (n - 1) / n of an all-reduce's bytes per process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {  # operators of the namespace c10d -> (kind, which argument says how much)
    "allreduce_": ("all_reduce", 0), "_allgather_base_": ("all_gather", 0), "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0), "_reduce_scatter_base_": ("reduce_scatter", 1), "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1), "alltoall_base_": ("all_to_all", 1), "alltoall_": ("all_to_all", 1),
    "send": ("send", 0), "broadcast_": ("broadcast", 0),
}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Counts while it is entered, in this thread; on the CPU the backward runs there too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if operator.namespace == "c10d":
            kind, place = KINDS.get(operator._schema.name.partition("::")[2], (None, 0))
            if kind is not None:
                self.calls[kind] += 1
                self.bytes[kind] += sum(tensor.nbytes for tensor in _tensors(args[place]))
        return operator(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
