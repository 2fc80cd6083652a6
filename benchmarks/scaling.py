"""One process against two, for every way to share the work: tokens per second, and bytes handed over in a step beside their arithmetic.

    python -m benchmarks.scaling [--rounds 3]

A random hybrid of 70 M parameters, rows of one document of 512 tokens, in bf16; each process has one thread. Both processes share the memory
and, on a machine of two hyperthreads, the core, so the ratios say what sharing costs, not what it gains on GPUs. The bytes hold anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Figures, in_turn, save, table
from benchmarks.models import CONFIGS

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
LAYOUTS = {
    "lora": {
        "one process": {}, "data=2": {"data": 2}, "shard=2": {"shard": 2}, "tensor=2": {"tensor": 2}, "data=2 expert=2": {"data": 2, "expert": 2},
        "context=2": {"context": 2}, "pipeline=2": {"pipeline": 2},
    },
    "full": {"one process": {}, "data=2": {"data": 2}, "shard=2": {"shard": 2}},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIGS["nemotron_h"] | {"vocab_size": 16384}))
        contenders = {
            f"{method}, {name}": command(Path(folder), method, degrees)
            for method, layouts in LAYOUTS.items()
            for name, degrees in layouts.items()
        }
        figures = in_turn(contenders, rounds=asked.rounds)
    path = save("scaling", {"figures": figures, "table": throughput(figures), "told": traffic(figures)}, packages=("torch",))
    print(throughput(figures), traffic(figures), sep="\n\n")
    print(f"wrote {path}", file=sys.stderr)


def command(model: Path, method: str, degrees: dict[str, int]) -> list[str]:
    """Of one contender: as many processes as its degrees multiply to."""
    nproc = 2 if degrees else 1
    words = ["-m", "benchmarks.scaling_worker", str(model), "--method", method, "--degrees", json.dumps(degrees)]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={nproc}", *words]


def throughput(figures: dict[str, Figures]) -> str:
    """Tokens per second of all processes together, against one process of the same method, and the largest process."""
    rows = []
    for name, found in figures.items():
        alone = figures[f"{name.partition(',')[0]}, one process"]
        ratio = found["tokens_per_second"] / alone["tokens_per_second"]
        rows.append(
            [
                name,
                f"{found['tokens_per_second']:,.0f}",
                f"{ratio:.2f}",
                f"{found['peak_gb']:.2f} GB",
                f"{found['peak_gb'] / alone['peak_gb']:.2f}",
            ]
        )
    return table(["what is trained, layout", "tokens/s", "to one process", "first process at its peak", "to one process"], rows)


def traffic(figures: dict[str, Figures]) -> str:
    """MB that a process hands to each kind of collective in a step of 2,048 tokens: counted, and by the arithmetic."""
    rows = [
        [name, kind, f"{found[f'{kind}_bytes'] / 1e6:,.3f}", f"{found.get(f'{kind}_expected', 0) / 1e6:,.3f}"]
        for name, found in figures.items()
        for kind in KINDS
        if found.get(f"{kind}_bytes", 0) > 1e3  # scalars aside
    ]
    return table(["what is trained, layout", "collective", "MB counted", "MB by arithmetic"], rows)


if __name__ == "__main__":
    main()
