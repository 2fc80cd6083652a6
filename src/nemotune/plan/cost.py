"""What a recipe trains and holds, computed from the model's real config on the meta device: exact counts, no weights read.

What the activations of a step take is no count but an estimate, kept apart from the rest: its formula is in `activations.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.filesize import decimal
from rich.table import Table

from nemotune.lora import Coverage, apply_lora, coverage
from nemotune.models import build_model, locate, read_config
from nemotune.models.quantize import quantize_modules
from nemotune.plan.activations import Activations
from nemotune.plan.held import Held, held_by_one, value_bytes
from nemotune.recipe import Recipe
from nemotune.recipe.degrees import Degrees
from nemotune.train.balance import require_experts
from nemotune.train.flops import Flops

DIVIDE_STEPS = ("tensor", "context", "pipeline")  # axes whose ranks share the tokens of a step, or the layers


@dataclass(frozen=True)
class Cost:
    """Parameter counts of the whole model, and what of it the process holds that holds the most, one of `processes`.

    `activation_bytes` estimates what a step's micro batch of `tokens` takes on top, at its peak, and `host_activation_bytes` in host memory,
    before the axes in `dividing` share that among processes. `flops_per_token` are a supervised token's operations, forward and backward, the mean over a document of `document_tokens`.
    """

    coverage: Coverage
    trained_parameters: int
    held: Held
    activation_bytes: int
    host_activation_bytes: int
    tokens: int
    flops_per_token: float
    document_tokens: int
    processes: int
    dividing: str

    @property
    def peak_bytes(self) -> int:
        """Of what is held and the activations."""
        return self.held.total_bytes + self.activation_bytes


def estimate(recipe: Recipe, *, device: str = "cuda") -> Cost:
    """The cost of `recipe` on a GPU, or on the CPU. Needs config.json alone.

    Raises RecipeError for LoRA targets that match nothing and for routers to balance that are not there.
    """
    model, degrees = build_model(read_config(locate(recipe.model.path, recipe.model.revision, weights=False))), Degrees.of(recipe.parallel)
    require_experts(model, recipe.train)
    if recipe.model.quantization == "nf4":
        quantize_modules(model, device="meta")
    model.requires_grad_(recipe.method != "lora")
    if recipe.method == "lora":
        apply_lora(model, recipe.lora)
    trained, covered = sum(p.numel() for p in model.parameters() if p.requires_grad), coverage(model)
    length, flops = recipe.data.sequence_length, Flops.of(model)
    tokens = recipe.train.micro_batch_size * length
    activations = Activations(
        model, trained=frozenset(row.block_type for row in covered.rows if row.adapted or recipe.method != "lora"),
        mode=recipe.train.activation_checkpointing, width=value_bytes(recipe), device=device,
    )  # fmt: skip
    return Cost(
        coverage=covered,
        trained_parameters=trained,
        held=held_by_one(recipe, model.config),
        activation_bytes=activations.peak_bytes(tokens),
        host_activation_bytes=activations.host_bytes(tokens),
        tokens=tokens,
        flops_per_token=flops.per_token + flops.per_target + flops.per_pair * (length + 1) / 2,
        document_tokens=length,
        processes=degrees.world_size,
        dividing=" ".join(f"parallel.{axis}={getattr(degrees, axis)}" for axis in DIVIDE_STEPS if getattr(degrees, axis) > 1),
    )


def cost_line(cost: Cost) -> str:
    """The bytes as people read them, of one process where there are several."""
    own = cost.held
    parts = {"weights": own.weight_bytes, "gradients": own.gradient_bytes, "optimiser": own.optimizer_bytes, "together": own.total_bytes}
    held = ", ".join(f"{what} {_told(size)}" for what, size in parts.items())
    if own.host_bytes:
        held += f"; experts in host memory {_told(own.host_bytes)}"
    whose = f"Memory of one process of {cost.processes} (that which holds the most)" if cost.processes > 1 else "Memory"
    step = f"A step of up to {cost.tokens:,} tokens at a time takes an estimated {_told(cost.activation_bytes)} more on a GPU"
    step += f" before {cost.dividing} divides that" if cost.dividing else f": {_told(cost.peak_bytes)} at its peak"
    if cost.host_activation_bytes:
        step += f", and {_told(cost.host_activation_bytes)} in host memory"
    return f"{whose} before activations: {held}\n{step}"


def _told(size: int) -> str:
    return decimal(size, precision=1)


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
