"""Where a training step of nemotune goes: seconds of each kind of block, of head and loss, forward and backward.

    python -m benchmarks.step --data NEMOTUNE_TEST_DATA [--family llama]

The setting of `train_vs_trl`: same model, rows and recipe. The step is taken apart at the borders of the blocks, each of which gets its
input and, in the backward, the gradient of its output; so parts add up to the whole but for the optimiser. Medians over some steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import RESULTS, save, table
from benchmarks.models import CONFIGS
from benchmarks.train_vs_trl import make_setting
from nemotune.data.loader import Batch, Loader
from nemotune.lora import apply_lora
from nemotune.models import CausalLM, load_model
from nemotune.ops.documents import Documents
from nemotune.recipe import load

Seconds = dict[tuple[str, str], float]  # (part, forward or backward)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory that holds data/glaive and data/nemotron")
    parser.add_argument("--family", choices=CONFIGS, default="nemotron_h")
    parser.add_argument("--steps", type=int, default=4, help="the first not counted")
    asked = parser.parse_args()
    path, prepared = make_setting(asked.family, asked.data)
    recipe = load(str(path))
    model = load_model(recipe.model.path, dtype=recipe.model.dtype)
    apply_lora(model.train(), recipe.lora)
    loader = Loader(prepared.train, global_batch_size=1, micro_batch_size=1, seed=0)
    taken = []
    for step in range(asked.steps):
        print(f"step {step + 1} of {asked.steps} ...", file=sys.stderr, flush=True)
        (batch,) = loader.step(step)
        taken.append((batch, step_in_parts(model, batch)))
        model.zero_grad()
    figures = {f"{part} {way}": statistics.median(found[part, way] for _, found in taken[1:]) for part, way in taken[0][1]}
    tokens = statistics.median(batch.num_tokens for batch, _ in taken[1:])
    supervised = statistics.median(batch.num_supervised for batch, _ in taken[1:])
    counts = {"tokens": tokens, "supervised": supervised, "blocks": count_blocks(model)}
    result = save("step", {"figures": figures, "counts": counts, "table": show(figures, **counts)}, packages=("torch",))
    print(show(figures, **counts))
    print(f"wrote {result.replace(RESULTS / f'step_{asked.family}.json')}", file=sys.stderr)


def step_in_parts(model: CausalLM, batch: Batch) -> Seconds:
    """One forward and backward, whose gradients are added to the parameters'."""
    seconds: Seconds = defaultdict(float)

    def timed(part: str, way: str, function: Callable[[], Tensor | None]) -> Tensor | None:
        started = time.perf_counter()
        result = function()
        seconds[part, way] += time.perf_counter() - started
        return result

    documents = Documents(batch.cu_seqlens, model.device)
    rope = model.rope(documents.positions_T)
    x = model.embeddings(batch.tokens_T).to(model.compute_dtype)
    pieces = []
    for block in model.blocks:
        x = x.detach().requires_grad_()
        y = timed(kind(block), "forward", lambda block=block, x=x: block(x, documents, rope, None))
        pieces.append((block, x, y))
        x = y
    x = x.detach().requires_grad_()
    loss = timed("head and loss", "forward", lambda: model.loss(model.final_norm(x), batch.targets_T) / batch.num_supervised)
    timed("head and loss", "backward", loss.backward)
    gradient = x.grad
    for block, x, y in reversed(pieces):
        timed(kind(block), "backward", lambda y=y, gradient=gradient: y.backward(gradient))
        gradient = x.grad
    return dict(seconds)


def kind(block: torch.nn.Module) -> str:
    """What a block is called in the table."""
    return getattr(block, "block_type", "block")


def count_blocks(model: CausalLM) -> dict[str, int]:
    """How many blocks of each kind there are."""
    kinds = [kind(block) for block in model.blocks]
    return {name: kinds.count(name) for name in dict.fromkeys(kinds)}


def show(figures: dict[str, float], *, tokens: float, supervised: float, blocks: dict[str, int]) -> str:
    """A row per part; the head's gradient is taken with its loss, chunk by chunk, in the forward."""
    parts = list(dict.fromkeys(name.rsplit(" ", 1)[0] for name in figures))
    total = sum(figures.values())
    rows = []
    for part in parts:
        both = [figures[f"{part} {way}"] for way in ("forward", "backward")]
        rows.append(
            (f"{part} ({blocks[part]})" if part in blocks else part, *(f"{value:.2f}" for value in both), f"{sum(both) / total:.0%}")
        )
    sums = [sum(value for name, value in figures.items() if name.endswith(way)) for way in ("forward", "backward")]
    rows.append((f"{tokens:.0f} tokens, {supervised:.0f} supervised", *(f"{value:.2f}" for value in sums), "100%"))
    return table(("part", "forward s", "backward s", "share"), rows)


if __name__ == "__main__":
    main()
