"""What a recipe trains and holds, computed from the model's real config on the meta device: exact counts, no weights read.

What the activations of a step take is no count but an estimate, kept apart from the rest: its formula is in `activations.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.filesize import decimal
from rich.table import Table
from torch import Tensor, nn

from nemotune.lora import Coverage, apply_lora, coverage
from nemotune.models import CausalLM, build_model, locate, read_config
from nemotune.models.offload import BUFFERS, expert_blocks
from nemotune.models.quantize import quantize_modules
from nemotune.plan.activations import Activations
from nemotune.recipe import Recipe
from nemotune.train.balance import require_experts
from nemotune.train.flops import Flops

OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2}  # two moments per trained parameter (8-bit: plus 4 bytes per block of 256)


@dataclass(frozen=True)
class Cost:
    """Bytes of weights as held (frozen ones in model.dtype, trained ones fp32), gradients and optimiser state; parameter counts.

    Experts that are offloaded are `host_bytes`; of them, `weight_bytes` has the two blocks' that are lent to the device.
    `activation_bytes` estimates what a step's micro batch of `tokens` takes on top, at its peak, and `host_activation_bytes` in host memory.
    `flops_per_token` are a supervised token's operations, forward and backward, the mean over a document of `document_tokens`.
    """

    coverage: Coverage
    trained_parameters: int
    weight_bytes: int
    host_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    host_activation_bytes: int
    tokens: int
    flops_per_token: float
    document_tokens: int

    @property
    def total_bytes(self) -> int:
        """Without activations."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def peak_bytes(self) -> int:
        return self.total_bytes + self.activation_bytes


def estimate(recipe: Recipe, *, device: str = "cuda") -> Cost:
    """The cost of `recipe` on a GPU, or on the CPU. Needs config.json alone.

    Raises RecipeError for LoRA targets that match nothing and for routers to balance that are not there.
    """
    model = build_model(read_config(locate(recipe.model.path, recipe.model.revision, weights=False)))
    require_experts(model, recipe.train)
    if recipe.model.quantization == "nf4":
        quantize_modules(model, device="meta")
    model.requires_grad_(recipe.method != "lora")
    lent, on_host = _experts_bytes(model, recipe) if recipe.model.offload == "experts" else (0, 0)
    if recipe.method == "lora":
        apply_lora(model, recipe.lora)
    trained, covered = sum(p.numel() for p in model.parameters() if p.requires_grad), coverage(model)
    length, flops = recipe.data.sequence_length, Flops.of(model)
    tokens = recipe.train.micro_batch_size * length
    activations = Activations(
        model, trained=frozenset(row.block_type for row in covered.rows if row.adapted or recipe.method != "lora"),
        mode=recipe.train.activation_checkpointing, width=_width(recipe), device=device,
    )  # fmt: skip
    return Cost(
        coverage=covered,
        trained_parameters=trained,
        weight_bytes=sum(_held_bytes(name, tensor, model, recipe) for name, tensor in held_tensors(model)) - on_host + lent,
        host_bytes=on_host,
        gradient_bytes=trained * 4,
        optimizer_bytes=trained * OPTIMIZER_BYTES[recipe.train.optimizer],
        activation_bytes=activations.peak_bytes(tokens),
        host_activation_bytes=activations.host_bytes(tokens),
        tokens=tokens,
        flops_per_token=flops.per_token + flops.per_target + flops.per_pair * (length + 1) / 2,
        document_tokens=length,
    )


def _experts_bytes(model: CausalLM, recipe: Recipe) -> tuple[int, int]:
    """Of frozen experts in host memory: the device's buffers, and all of them."""
    blocks = [
        sum(_held_bytes(f".{name}", tensor, model, recipe) for module in modules for name, tensor in held_tensors(module))
        for modules in expert_blocks(model)
    ]
    return sum(blocks[:BUFFERS]), sum(blocks)


def held_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything that stays in memory, by name: parameters, once each, and buffers."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _held_bytes(name: str, tensor: Tensor, model: CausalLM, recipe: Recipe) -> int:
    """As loading holds it: what is trained and what the family asks for in fp32, NF4 as it is, the rest in model.dtype."""
    if tensor.requires_grad or model.stays_fp32(name) or ".nf4_" in name:
        return tensor.numel() * tensor.element_size()
    return tensor.numel() * _width(recipe)


def _width(recipe: Recipe) -> int:
    return 2 if recipe.model.dtype == "bfloat16" else 4


def cost_line(cost: Cost) -> str:
    """The bytes as people read them."""
    parts = {
        "weights": cost.weight_bytes,
        "gradients": cost.gradient_bytes,
        "optimiser": cost.optimizer_bytes,
        "together": cost.total_bytes,
    }
    held = ", ".join(f"{what} {decimal(size, precision=1)}" for what, size in parts.items())
    if cost.host_bytes:
        held += f"; experts in host memory {decimal(cost.host_bytes, precision=1)}"
    return (
        f"Memory before activations: {held}\nA step of up to {cost.tokens:,} tokens at a time takes an estimated "
        f"{decimal(cost.activation_bytes, precision=1)} more on a GPU: {decimal(cost.peak_bytes, precision=1)} at its peak"
        + (f", and {decimal(cost.host_activation_bytes, precision=1)} in host memory" if cost.host_activation_bytes else "")
    )


def flops_line(cost: Cost) -> str:
    """The operations in GFLOP."""
    return (
        f"A supervised token in a document of {cost.document_tokens:,} takes {cost.flops_per_token / 1e9:,.3g} GFLOP, forward and backward"
    )


def coverage_table(covered: Coverage) -> Table:
    """Block type by block type, what LoRA reaches."""
    table = Table(title="LoRA coverage", title_justify="left", header_style="bold")
    for heading in ("block type", "layers", "modules", "adapted", "parameters", "MB"):
        table.add_column(heading, justify="left" if heading == "block type" else "right")
    for row in covered.rows:
        style = None if row.adapted else "dim"
        table.add_row(
            row.block_type,
            str(row.layers),
            str(row.modules),
            str(row.adapted),
            f"{row.parameters:,}",
            f"{row.bytes / 1e6:,.2f}",
            style=style,
        )
    share = covered.parameters / covered.base_parameters
    table.caption = f"{covered.parameters:,} of {covered.base_parameters:,} parameters train ({share:.2%})"
    return table
