"""The tensors of an empty model cut down to what one process holds, and the modules told of it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from nemotune.models import CausalLM
from nemotune.weights import Layout

SIZES = {
    "out_features": -2,
    "in_features": -1,
    "num_experts": -3,
    "num_embeddings": -2,
}  # attributes of modules, by the dim of their weight


def hold(model: CausalLM, parts: Mapping[str, Layout]) -> None:
    """Let the tensors named in `parts` be those parts, and sizes that modules keep of their weight follow."""
    for name, layout in parts.items():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, last)
        new = old.new_empty(layout.local_shape)
        if isinstance(old, nn.Parameter):
            setattr(module, last, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            module._buffers[last] = new
        model.layouts[name] = layout
        if last == "weight" and hasattr(module, "part"):
            module.part = layout
            for attribute, dim in SIZES.items():
                if hasattr(module, attribute):
                    setattr(module, attribute, layout.local_shape[dim])
