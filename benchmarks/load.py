"""Loading a model directory: seconds and memory of nemotune in bf16 and NF4, and of transformers in bf16.

    python -m benchmarks.load [--family llama] [--repeats 1] [--rounds 3] [--small]

Each load is a process of its own over the same random directory, which lies in the page cache after the first. Seconds run from the call
until a value of every 4 KB of every tensor was read: both may map files and read them late. `imports_gb` is what the process held before.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch

from benchmarks.harness import in_turn, peak_resident_gb, report, save, table
from benchmarks.models import CONFIGS
from nemotune.models import load_model, save_model

LAYERS = {"nemotron_h": "hybrid_override_pattern", "llama": "num_hidden_layers"}
SMALL = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128}


def main(argv: Sequence[str] | None = None) -> None:
    asked = _arguments(argv)
    if asked.contender:
        report(load(asked.contender, asked.model))
        return
    model = asked.work / f"{asked.family}-{asked.repeats}{'-small' if asked.small else ''}"
    if not model.is_dir():
        write_weights(asked.family, model, repeats=asked.repeats, small=asked.small)
    command = [sys.executable, "-m", "benchmarks.load", "--model", str(model), "--contender"]
    figures = in_turn({name: [*command, name] for name in CONTENDERS}, rounds=asked.rounds)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e9
    path = save(
        "load",
        {"family": asked.family, "directory_gb": size, "figures": figures, "table": show(figures, size)},
        packages=("torch", "transformers", "safetensors"),
    )
    print(show(figures, size))
    print(f"wrote {path}", file=sys.stderr)


def write_weights(family: str, directory: Path, *, repeats: int, small: bool) -> None:
    """A random model of `family` with its layers `repeats` times over: weights and config alone."""
    config = CONFIGS[family] | (SMALL if small else {})
    config |= {LAYERS[family]: config[LAYERS[family]] * repeats, "num_hidden_layers": config["num_hidden_layers"] * repeats}
    blank = directory.with_name(directory.name + "-blank")
    blank.mkdir(parents=True, exist_ok=True)
    (blank / "config.json").write_text(json.dumps(config))
    save_model(load_model(blank, dtype="bfloat16", random_seed=0), directory, overwrite=True)
    shutil.rmtree(blank)


def load(contender: str, directory: Path) -> dict[str, float]:
    """Seconds to load `directory` and touch its weights; gigabytes of the process before."""
    find_loader = CONTENDERS[contender]
    call = find_loader()
    before = peak_resident_gb()
    started = time.perf_counter()
    _touch(call(directory))
    return {"seconds": time.perf_counter() - started, "imports_gb": before}


def _touch(model: torch.nn.Module) -> None:
    for tensor in _tensors(model):
        tensor.detach().flatten()[:: 4096 // tensor.element_size()].sum()


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    return chain(model.parameters(), model.buffers())


def _nemotune(quantization: str) -> Callable[[Path], torch.nn.Module]:
    return lambda directory: load_model(directory, dtype="bfloat16", quantization=quantization)  # type: ignore[arg-type]


def _transformers() -> Callable[[Path], torch.nn.Module]:
    from transformers import AutoModelForCausalLM

    return lambda directory: AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


CONTENDERS: dict[str, Callable[[], Callable[[Path], torch.nn.Module]]] = {
    "nemotune, bf16": lambda: _nemotune("none"),
    "nemotune, NF4": lambda: _nemotune("nf4"),
    "transformers, bf16": _transformers,
}


def show(figures: dict[str, dict[str, float]], size: float) -> str:
    """The figures; memory also less what the process held before the load, in units of the directory."""
    rows = [
        (name, f"{f['seconds']:.2f}", f"{f['peak_gb']:.2f}", f"{f['imports_gb']:.2f}", f"{(f['peak_gb'] - f['imports_gb']) / size:.2f}")
        for name, f in figures.items()
    ]
    return table((f"{size:.2f} GB of weights", "seconds", "peak GB", "of it imports", "the rest, in directories"), rows)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=CONFIGS, default="nemotron_h")
    parser.add_argument("--repeats", type=int, default=1, help="how many times over the model has its layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a model of a few megabytes, to try the script")
    parser.add_argument("--work", type=Path, default=Path("runs") / "benchmarks" / "load", help="where the model is kept")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
