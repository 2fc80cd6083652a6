"""Arithmetic, not measurement: what docs/parallelism.md's bytes come to for Nano-30B on 8, 64 and 512 H100s.

    python -m benchmarks.projection --config CONFIG.json

Computing takes the step's FLOPs at `MFU` of the data sheet's peak. Within a machine of 8 GPUs bytes travel at NVLink's 450 GB/s, between machines at 50 GB/s
a GPU (400 Gb/s InfiniBand), both ways at once. `hidden` is as if everything that is sent went on behind the computing, `in turn` as if nothing did; what is
measured one day should lie between the two. Left out are bubbles, uneven experts, the optimiser and the reading of rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import save, table
from nemotune.lora import apply_lora
from nemotune.models import CausalLM, build_model, read_config
from nemotune.models.layers import GroupedLinear
from nemotune.recipe import Lora
from nemotune.train.flops import Flops

PEAK, MFU = 989e12, 0.4
NVLINK, INFINIBAND = 450e9, 50e9
MACHINE = 8
GPUS = (8, 64, 512)


@dataclass(frozen=True)
class Job:
    """A recipe's batch: rows of `length` tokens, `rows` a step, one at a time on each GPU."""

    name: str
    method: str
    rows: int
    length: int


JOBS = (
    Job("LoRA, 128 rows of 2,048", "lora", 128, 2048),
    Job("pretraining, 3,072 rows of 8,192", "full", 3072, 8192),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    asked = parser.parse_args()
    rows = [line for job in JOBS for gpus in GPUS if (line := project(job, gpus, model_of(asked.config, job.method)))]
    headings = [
        "job (expert=8, shard=8 in a machine, data across)",
        "GPUs",
        "compute s",
        "in a machine s",
        "between machines s",
        "tokens/s, hidden",
        "in turn",
    ]
    path = save("projection", {"table": table(headings, rows)}, packages=("torch",))
    print(table(headings, rows))
    print(f"wrote {path}", file=sys.stderr)


def model_of(config: Path, method: str) -> CausalLM:
    """The model without its values, with what `method` trains."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(config.read_text())
        model = build_model(read_config(Path(folder))).requires_grad_(method == "full")
    if method == "lora":
        apply_lora(model, Lora(rank=16))
    return model


def project(job: Job, gpus: int, model: CausalLM) -> list[str] | None:
    """A line of the table; None where a GPU would have less than a row."""
    if job.rows < gpus:
        return None
    flops, machines, rows = Flops.of(model), gpus // MACHINE, job.rows / gpus
    tokens = rows * job.length
    compute = (tokens * (flops.per_token + flops.per_target) + rows * flops.per_pair * job.length * (job.length + 1) / 2) / (PEAK * MFU)
    within = (expert_bytes(model, tokens) + rows * sharded_bytes(model, job.method)) * (MACHINE - 1) / MACHINE / NVLINK
    reduced = 2 * (machines - 1) / machines * 4 * trained_on_a_gpu(model, job.method)
    within += 0 if job.method == "full" else 2 * (MACHINE - 1) / MACHINE * 4 * trained_on_a_gpu(model, "lora but experts") / NVLINK
    between = reduced / INFINIBAND
    hidden, in_turn = max(compute, within + between), compute + within + between
    speeds = [f"{job.rows * job.length / seconds:,.0f}" for seconds in (hidden, in_turn)]
    return [job.name, str(gpus), f"{compute:.3f}", f"{within:.3f}", f"{between:.3f}", *speeds]


def expert_bytes(model: CausalLM, tokens: float) -> float:
    """Of rows that travel to experts and back, forward and backward."""
    c = model.config
    return tokens * 8 * c.num_experts_per_tok * (c.moe_latent_size or c.hidden_size) * len(c.expert_layers)


def sharded_bytes(model: CausalLM, method: str) -> float:
    """Of what FSDP gathers and scatters for a row: all matrices but the experts'."""
    whole = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "lora_" not in name)
    ends = 2 * model.config.vocab_size * model.config.hidden_size
    own = 4 if method == "full" else 2
    return 2 * 2 * (whole - ends) + own * ends + (4 * whole if method == "full" else 0)


def trained_on_a_gpu(model: CausalLM, method: str) -> float:
    """Parameters whose gradients a GPU adds up: of experts an eighth; of matrices that FSDP has divided an eighth."""
    total = 0.0
    experts = {id(p) for module in model.modules() if isinstance(module, GroupedLinear) for p in module.parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_expert = id(p) in experts or ".experts." in name
            is_divided = is_expert or (method == "full" and p.ndim == 2)
            if not (is_expert and method == "lora but experts"):
                total += p.numel() / (MACHINE if is_divided else 1)
    return total


if __name__ == "__main__":
    main()
