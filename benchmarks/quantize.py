"""GGML's block types: how many values nemotune packs in a CPU-second, beside llama.cpp's `ggml_quantize_chunk` (the library in xllamacpp's wheel).

    python -m benchmarks.quantize [--million 4] [--rounds 5]

The same normal bfloat16 rows, in turn in one process, with one thread and, of nemotune, with one a core; the bytes are compared first. llama.cpp gets
the rows as float32, so its time lacks the conversion that ours holds. Time is the processors', and a rate the best of the rounds: other work on the
machine lowers either.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType

from benchmarks.harness import save, table
from nemotune.export.gguf.quants import KINDS, quantize, row_bytes

QUANTISED = [kind for kind, packing in KINDS.items() if packing.pack]


def main(argv: Sequence[str] | None = None) -> None:
    asked = _arguments(argv)
    torch.set_num_threads(1)  # as in an export, whose threads are those that call
    rows = (torch.randn(int(asked.million * 1024), 1024, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    figures = {kind: measure(rows, kind, asked.rounds) for kind in QUANTISED}
    path = save("quantize", {"figures": figures, "table": show(figures)}, packages=("torch", "numpy", "xllamacpp"))
    print(show(figures))
    print(f"wrote {path}", file=sys.stderr)


def measure(rows: torch.Tensor, kind: str, rounds: int) -> dict[str, float]:
    """Million values in a CPU-second: by one thread of each, and by a thread a core of ours."""
    print(f"{kind} ...", file=sys.stderr, flush=True)
    widened, threads = rows.half().float(), len(os.sched_getaffinity(0))
    if not np.array_equal(quantize(rows, kind), llama_cpp(widened, kind)):
        raise SystemExit(f"{kind}: bytes differ from llama.cpp's")
    with ThreadPoolExecutor(threads) as pool:
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda: quantize(rows, kind),
            "llama_cpp": lambda: llama_cpp(widened, kind),
            "threads": lambda: list(pool.map(lambda _: quantize(rows, kind), range(threads))),
        }
        found = [{name: cpu_seconds(call) for name, call in calls.items()} for _ in range(rounds)]
    packed = {"ours": 1, "llama_cpp": 1, "threads": threads}
    return {name: times * rows.numel() / 1e6 / min(one[name] for one in found) for name, times in packed.items()}


def cpu_seconds(call: Callable[[], object]) -> float:
    """Of all threads."""
    started = time.process_time()
    call()
    return time.process_time() - started


def llama_cpp(x: torch.Tensor, kind: str) -> np.ndarray:
    """uint8 [rows, bytes] of float32 [rows, row_length], by llama.cpp."""
    import xllamacpp

    (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    chunk = ctypes.CDLL(str(path)).ggml_quantize_chunk
    chunk.restype, chunk.argtypes = ctypes.c_size_t, [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    values = np.ascontiguousarray(x.float().numpy())
    packed = np.empty((len(values), row_bytes(kind, values.shape[1])), np.uint8)
    if chunk(GGMLQuantizationType[kind], values.ctypes.data, packed.ctypes.data, 0, *values.shape, None) != packed.size:
        raise AssertionError(f"{kind}: llama.cpp wrote another number of bytes")
    return packed


def show(figures: dict[str, dict[str, float]]) -> str:
    """A row per type."""
    headings = ["million values in a CPU-second", "nemotune", "llama.cpp", "to llama.cpp", "nemotune, a thread a core"]
    rows = [
        [kind, f"{row['ours']:.1f}", f"{row['llama_cpp']:.1f}", f"{row['ours'] / row['llama_cpp']:.2f}", f"{row['threads']:.1f}"]
        for kind, row in figures.items()
    ]
    return table(headings, rows)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=float, default=4, help="values (of 2^20) that a call packs")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
