"""Every op of src/nemotune/ops, forward and backward, against transformers' own torch path and the matrix product of this machine.

    python -m benchmarks.ops [--device cuda] [--size small|scaled|nano] [--seconds 0.5]

Both get the same tensors, in turn in one process; what they give is compared first. `scaled` is Nano-30B at about a quarter of
its widths, `nano` at its own. A share is the op's useful floating-point operations (those of its matrix products: two a multiply-add, forward plus
what the gradients need) over the time, in units of a large square product in the same dtype; ops without products have none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.harness import save, table
from benchmarks.op_cases import CASES, SIZES, Case, Data
from benchmarks.roofline import Clock, matmul_ceiling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(argv: Sequence[str] | None = None) -> None:
    asked = _arguments(argv)
    clock, figures = Clock(asked.device, asked.seconds), {}
    for name, dtype in DTYPES.items():
        ceiling = matmul_ceiling(clock, dtype, size=SIZES[asked.size].ceiling)
        rows = {}
        for case in CASES:
            print(f"{name}: {case.__name__} ...", file=sys.stderr, flush=True)
            rows |= {made.name: measure(made, clock, ceiling) for made in case(Data(SIZES[asked.size], dtype, asked.device))}
        figures[name] = {"matmul_gflops": ceiling / 1e9, "ops": rows}
    path = save("ops", {"figures": figures, "table": show(figures)}, packages=("torch", "transformers", "bitsandbytes"))
    print(show(figures))
    print(f"wrote {path}", file=sys.stderr)


def measure(case: Case, clock: Clock, ceiling: float) -> dict[str, float]:
    """Milliseconds of both, how far apart their results are, and the shares of the ceiling."""
    ours, theirs = case.ours(), case.theirs()
    difference = ((ours.float() - case.as_ours(theirs).float()).abs().max() / ours.float().abs().max().clamp(min=1e-12)).item()
    seconds = clock.medians(ours=_both_ways(case.ours, case.inputs), theirs=_both_ways(case.theirs, case.inputs))
    figures = {f"{who}_ms": 1e3 * found for who, found in seconds.items()}
    figures |= {"ratio": seconds["theirs"] / seconds["ours"], "difference": difference}
    return figures | {f"{who}_share": case.flops / found / ceiling for who, found in seconds.items() if case.flops}


def _both_ways(forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    """The forward and, where inputs want one, the gradients of them all."""
    if not inputs:
        return forward
    seed = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), inputs, seed)


def show(figures: dict[str, dict]) -> str:
    """A row per op, a group of columns per dtype; the last row is the ceiling."""
    headings = [""]
    rows: dict[str, list[str]] = {}
    for dtype, found in figures.items():
        headings += [f"{dtype}: nemotune ms", "transformers ms", "times faster", "share of a product", "transformers'"]
        for name, row in found["ops"].items():
            shares = [f"{row[key]:.0%}" if key in row else "" for key in ("ours_share", "theirs_share")]
            rows.setdefault(name, [name]).extend([f"{row['ours_ms']:.2f}", f"{row['theirs_ms']:.2f}", f"{row['ratio']:.2f}", *shares])
    ceilings = [cell for found in figures.values() for cell in ("", "", "", f"{found['matmul_gflops']:.0f} GFLOP/s", "")]
    return table(headings, [*rows.values(), ["a large product", *ceilings]])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, default="scaled")
    parser.add_argument("--seconds", type=float, default=0.5, help="that the slower contender is called for, per op and dtype")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
