"""Memory of QLoRA: what `nemotune plan` counts beside what a process holds, at Nano-30B's widths and with few layers, on a CPU.

    python -m benchmarks.qlora_memory [--sequence 1024] [--layers MEM*] [--small]

The weights are random, written as a checkpoint in bf16 and read from there into NF4, with LoRA of rank 16 on attention, mamba and
shared_experts. Each checkpointing mode is a process of its own; memory is resident bytes over those after the imports, without pages of
mapped files: after loading, and the most of three steps of one packed row each. The C library gives freed blocks back at once, so that
what is resident is in use; it maps large ones in large pages, which halves the time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.setting import NANO_30B, SMALL, Setting
from benchmarks.harness import in_turn, report, save, table
from nemotune.distributed.gradients import gradient_norm
from nemotune.lora import apply_lora
from nemotune.models import load_model, save_model
from nemotune.plan.cost import Cost, estimate
from nemotune.recipe import Recipe
from nemotune.train.activation import set_activation_checkpointing
from nemotune.train.optim import make_optimizer
from nemotune.train.step import accumulate, update

MODES, STEPS = ("full", "selective", "none"), 3
LORA = {"rank": 16, "targets": ["attention", "mamba", "shared_experts"]}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**22), "MALLOC_TRIM_THRESHOLD_": str(2**22), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def main(argv: Sequence[str] | None = None) -> None:
    asked = _arguments(argv)
    if asked.mode:
        report(measure(asked.model, asked.mode, sequence=asked.sequence, small=asked.small))
        return
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        size = write_weights(model, layers=asked.layers, small=asked.small)
        os.environ |= GIVE_BACK
        command = [sys.executable, "-m", "benchmarks.qlora_memory", "--model", str(model), "--sequence", str(asked.sequence)]
        command += [*(["--small"] if asked.small else []), "--mode"]
        figures = in_turn({mode: [*command, mode] for mode in MODES}, rounds=1)
    about = {"layers": asked.layers, "sequence": asked.sequence, "directory_gb": size / 1e9}
    path = save("qlora_memory", about | {"figures": figures, "table": show(figures)}, packages=("torch", "safetensors"))
    print(show(figures))
    print(f"wrote {path}", file=sys.stderr)


def write_weights(directory: Path, *, layers: str, small: bool) -> int:
    """A random Nano-30B with these layers alone, in bf16; returns its bytes."""
    config = (SMALL if small else NANO_30B) | {"hybrid_override_pattern": layers, "num_hidden_layers": len(layers)}
    blank = directory.with_name("blank")
    blank.mkdir()
    (blank / "config.json").write_text(json.dumps(config))
    save_model(load_model(blank, dtype="bfloat16", random_seed=0), directory)
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def recipe_of(directory: Path, mode: str, *, sequence: int) -> Recipe:
    """QLoRA on `directory`, one packed row of `sequence` tokens at a time."""
    return Recipe.model_validate({
        "name": "qlora-memory", "model": {"path": str(directory), "quantization": "nf4"},
        "data": {"format": "text", "train": "rows.jsonl", "sequence_length": sequence}, "lora": LORA,
        "train": {"activation_checkpointing": mode},
    })  # fmt: skip


def measure(directory: Path, mode: str, *, sequence: int, small: bool) -> dict[str, float]:
    """Gigabytes over what the imports take: held after loading and at most in the steps, each planned and found."""
    recipe = recipe_of(directory, mode, sequence=sequence)
    cost = estimate(recipe, device="cpu")
    before = resident_bytes("RssAnon")
    model = load_model(directory, quantization="nf4")
    keys = apply_lora(model, recipe.lora)
    held = resident_bytes("RssAnon") - before
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters, recipe.train)
    set_activation_checkpointing(model, mode)
    model.train()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    batches = Setting(f"native-nf4-{sequence}", small=small, device="cpu", experts=False, checkpointing=mode, warmup_steps=0, steps=STEPS)
    for step in range(STEPS):
        accumulate(model, batches.loader.step(step), keys=keys, seed=0, step=step)
        norm = gradient_norm(parameters.values())
        update(parameters.values(), optimizer, learning_rate=1e-4, grad_norm=norm, max_grad_norm=1.0)
    peak = resident_bytes("VmHWM") - resident_bytes("RssFile") - before
    return planned(cost) | {"held_gb": held / 1e9, "step_gb": peak / 1e9}


def planned(cost: Cost) -> dict[str, float]:
    return {"planned_held_gb": cost.held.weight_bytes / 1e9, "planned_step_gb": cost.peak_bytes / 1e9}


def resident_bytes(which: str) -> int:
    """What of this process is in memory: RssAnon its own, RssFile of mapped files, VmHWM both at most since that was last reset."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def show(figures: dict[str, dict[str, float]]) -> str:
    """Planned beside found, a row for each mode."""
    rows = []
    for mode, f in figures.items():
        row = [mode]
        for what in ("held", "step"):
            found, plan = f[f"{what}_gb"], f[f"planned_{what}_gb"]
            row += [f"{plan:.2f}", f"{found:.2f}", f"{plan / found - 1:+.0%}"]
        rows.append(row)
    return table(
        ("checkpointing", "after loading: planned GB", "found", "plan off by", "in a step: planned GB", "found", "plan off by"), rows
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument("--layers", default="MEM*", help="the blocks: M Mamba, E experts, * attention, - MLP")
    parser.add_argument("--small", action="store_true", help="a model of a few megabytes, to try the script")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
