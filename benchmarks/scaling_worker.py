"""One process of one contender of `scaling`: training steps on a random model, and what they hand to other processes. Started by torchrun."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.arithmetic import Setting, expected_bytes
from benchmarks.harness import peak_resident_gb
from benchmarks.traffic import Traffic
from nemotune.data.loader import Loader
from nemotune.data.split import Document
from nemotune.distributed import Gradients, World, arrange, connect, divide, layouts_of, replicas, start
from nemotune.distributed.world import BATCHES
from nemotune.lora import apply_lora
from nemotune.models import load_model
from nemotune.recipe import Lora, Train
from nemotune.recipe.degrees import Degrees
from nemotune.train.optim import make_optimizer
from nemotune.train.step import accumulate, update

LENGTH = 512
LORA = Lora(rank=16, targets="default")


class Rows:
    """Rows of random tokens, a document each, every second token a target."""

    in_order = True

    def __init__(self, count: int, vocab_size: int):
        random = np.random.RandomState(0)
        self.documents = [
            Document(random.randint(0, vocab_size, LENGTH).astype(np.int32), np.arange(LENGTH) % 2 == 0, row) for row in range(count)
        ]
        self.packs = [np.array([row]) for row in range(count)]

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Document:
        return self.documents[index]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--degrees", type=json.loads, default={})
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--steps", type=int, default=5, help="the first not counted")
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    asked = parser.parse_args()
    with start(Degrees(**asked.degrees)) as world:
        figures = measure(asked, world)
        if world.is_first:
            print(json.dumps(figures))


def measure(asked: argparse.Namespace, world: World) -> dict[str, float]:
    """Tokens per second of all processes, this one's largest size; bytes that a process hands over in a step, and by the arithmetic."""
    model = load_model(
        asked.model, dtype="bfloat16", trainable=asked.method == "full", random_seed=0, arrange=partial(arrange, world=world),
        ready=partial(divide, world=world, compute_dtype=torch.bfloat16),
    )  # fmt: skip
    keys = apply_lora(model, LORA) if asked.method == "lora" else None
    connect(model, world, keys)
    model.train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = Gradients(parameters, layouts_of(model), replicas=replicas(model), world=world)
    optimizer = make_optimizer(parameters, Train())
    rows = Rows(asked.rows * asked.steps, model.config.vocab_size)
    hand = world.index(*BATCHES), world.degree(*BATCHES)
    loader = Loader(rows, global_batch_size=asked.rows, micro_batch_size=1, seed=0, hand=hand)  # type: ignore[arg-type]
    seconds, tokens, traffic = [], 0, Traffic()
    for step in range(asked.steps):
        world.barrier()
        began = time.perf_counter()
        with traffic if step == 1 else nullcontext():
            result = accumulate(model, loader.step(step), keys=keys, seed=0, step=step, world=world)
            gradients.reduce()
            norm = gradients.norm()
            update(parameters.values(), optimizer, learning_rate=1e-4, grad_norm=norm, max_grad_norm=1.0)
        world.barrier()
        if step > 1:
            seconds.append(time.perf_counter() - began)
            tokens += result.tokens
    figures = {"tokens_per_second": tokens / sum(seconds), "peak_gb": peak_resident_gb()}
    expected = expected_bytes(Setting(model, world, rows=asked.rows, length=LENGTH, method=asked.method))
    for which, counts in (("bytes", traffic.bytes), ("expected", expected)):
        of_all = world.gather(dict(counts))  # experts and stages differ
        for kind in sorted({kind for found in of_all for kind in found}):
            figures[f"{kind}_{which}"] = sum(found.get(kind, 0) for found in of_all) / world.size
    return figures


if __name__ == "__main__":
    main()
