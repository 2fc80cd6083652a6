"""A model made ready for its processes, from outside: what each holds (`arrange`, on the empty model) and how they meet (`connect`).

    build on the meta device -> arrange -> load those parts -> adapters -> connect

Which tensors are split how is said in one file per axis (what `hold` does to them is in `holding.py`); the layouts of all parameters come together in `layouts_of`.
"""

from __future__ import annotations

from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nemotune.distributed import context, experts, regions, shard, stages, tensor
from nemotune.distributed.world import World
from nemotune.lora import DropoutKeys
from nemotune.lora.layers import LoRALayer
from nemotune.models import CausalLM
from nemotune.weights import Layout


def arrange(model: CausalLM, world: World) -> None:
    """Shrink the empty `model` to what this process holds; `model.layouts` says which parts."""
    stages.arrange(model, world)  # first: it weighs whole layers
    tensor.arrange(model, world)
    if world.degrees.expert > 1:
        experts.arrange(model, world)


def connect(model: CausalLM, world: World, keys: DropoutKeys | None) -> None:
    """Let the processes' parts of the loaded, adapted `model` compute together; `keys` are those of its adapters."""
    regions.connect(model, world)
    if world.degrees.expert > 1:
        experts.connect(model, world)
    if world.degrees.context > 1:
        context.connect(model, world)
    shard.connect(model, world)  # last: it gathers what the others have swapped


def layouts_of(model: CausalLM) -> dict[str, Layout]:
    """Which part of each parameter and buffer this process holds, adapters included, by the names that they have here."""
    adapters = {
        f"{name}.{which}": layout
        for name, layer in model.named_modules()
        if isinstance(layer, LoRALayer)
        for which, layout in layer.layouts().items()
    }
    found = {}
    for name, held in [*model.named_parameters(), *model.named_buffers()]:
        layout = adapters.get(name) or model.layout(name.replace(".base.", "."), held)
        found[name] = _rows_of_fsdp(held, layout) if isinstance(held, DTensor) else layout
    return found


def replicas(model: CausalLM) -> set[str]:
    """Parameters whose gradient every tensor rank computes whole: those outside of the tensor-parallel regions."""
    within = tuple(f"{name}." for name in regions.regions(model))
    return {name for name, _ in model.named_parameters() if not name.startswith(within)}


def _rows_of_fsdp(tensor: DTensor, layout: Layout) -> Layout:
    """FSDP divides what is held along dim 0."""
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return layout.rows(offsets[0], offsets[0] + sizes[0])
