"""Bytes that a process holds before it computes: weights, gradients, optimiser. Exact, from the model's config on the meta device.

Of several processes each holds a part, the one that training would give it: `distributed.arrange` and FSDP's division say which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from nemotune.distributed import arrange
from nemotune.distributed.shard import divided
from nemotune.distributed.world import World
from nemotune.lora import apply_lora
from nemotune.models import CausalLM, LlamaConfig, NemotronHConfig, build_model
from nemotune.models.offload import BUFFERS, expert_blocks
from nemotune.models.quantize import quantize_modules
from nemotune.recipe import Recipe
from nemotune.recipe.degrees import Degrees

OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2}  # two moments per trained parameter (8-bit: plus 4 bytes per block of 256)


@dataclass(frozen=True)
class Held:
    """Bytes of weights as held (frozen ones in model.dtype, trained ones fp32), gradients and optimiser state.

    Experts that are offloaded are `host_bytes`; of them, `weight_bytes` has the two blocks' that are lent to the device.
    """

    weight_bytes: int = 0
    host_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """On the device."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def held_by_one(recipe: Recipe, config: NemotronHConfig | LlamaConfig) -> Held:
    """What the process of `recipe` that holds the most does: stages differ, and the first rank of a stage holds as much as any in it."""
    degrees = Degrees.of(recipe.parallel)
    in_stage = degrees.world_size // degrees.pipeline
    return max((_held(recipe, config, World(degrees, rank=stage * in_stage)) for stage in range(degrees.pipeline)), key=_total)


def _total(held: Held) -> int:
    return held.total_bytes


def _held(recipe: Recipe, config: NemotronHConfig | LlamaConfig, world: World) -> Held:
    model = build_model(config)
    arrange(model, world)
    if recipe.model.quantization == "nf4":
        quantize_modules(model, device="meta")
    model.requires_grad_(recipe.method != "lora")
    in_shards = divided(model, world)
    lent, on_host = _experts_bytes(model, recipe) if recipe.model.offload == "experts" else (0, 0)
    if recipe.method == "lora":
        apply_lora(model, recipe.lora)

    def part(tensor: Tensor, size: int) -> int:
        """FSDP divides rows, the first rank having as many as any."""
        return size // len(tensor) * -(-len(tensor) // world.degrees.shard) if tensor in in_shards else size

    weights = sum(part(tensor, _bytes_of(name, tensor, model, recipe)) for name, tensor in held_tensors(model))
    trained = sum(part(p, p.numel()) for p in model.parameters() if p.requires_grad)
    return Held(weights - on_host + lent, on_host, trained * 4, trained * OPTIMIZER_BYTES[recipe.train.optimizer])


def _experts_bytes(model: CausalLM, recipe: Recipe) -> tuple[int, int]:
    """Of frozen experts in host memory: the device's buffers, and all of them."""
    blocks = [
        sum(_bytes_of(f".{name}", tensor, model, recipe) for module in modules for name, tensor in held_tensors(module))
        for modules in expert_blocks(model)
    ]
    return sum(blocks[:BUFFERS]), sum(blocks)


def held_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything that stays in memory, by name: parameters, once each, and buffers."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _bytes_of(name: str, tensor: Tensor, model: CausalLM, recipe: Recipe) -> int:
    """As loading holds it: what is trained and what the family asks for in fp32, NF4 as it is, the rest in model.dtype."""
    if tensor.requires_grad or model.stays_fp32(name) or ".nf4_" in name:
        return tensor.numel() * tensor.element_size()
    return tensor.numel() * value_bytes(recipe)


def value_bytes(recipe: Recipe) -> int:
    """Of a value in model.dtype."""
    return 2 if recipe.model.dtype == "bfloat16" else 4
