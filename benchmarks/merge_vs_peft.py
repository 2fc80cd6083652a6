"""Merging an adapter into its base: nemotune, PEFT, and a plain copy of the base's files to the same disk, in turn.

    python -m benchmarks.merge_vs_peft --data DIR [--family llama] [--rounds 3]

DIR is a folder with nemotron/tokenizer and nemotron/chat_templates. Everything is measured from outside and ends when the bytes are on the
disk: imports count, and what PEFT and the copy wrote is synced as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Figures, in_turn, save, table
from benchmarks.watch import watched

CONTENDERS = ("nemotune", "its imports alone", "PEFT", "a copy")


def main(argv: Sequence[str] | None = None) -> None:
    asked = _arguments(argv)
    work = asked.work / f"{asked.family}{'-small' if asked.small else ''}"
    if asked.step:
        STEPS[asked.step](work / "base", work / "adapter", asked.out or work / "out")
        return
    command = [
        sys.executable,
        "-m",
        "benchmarks.merge_vs_peft",
        "--family",
        asked.family,
        "--work",
        str(asked.work),
        *["--small"] * asked.small,
    ]
    if asked.contender:
        shutil.rmtree(work / "out", ignore_errors=True)
        print(json.dumps(watched([[*command, "--step", asked.contender]], work / "out")))
        shutil.rmtree(work / "out")
        return
    from benchmarks.exported import write_base_and_adapter

    write_base_and_adapter(asked.family, work, nemotron=asked.data / "nemotron", small=asked.small)
    figures = in_turn({name: [*command, "--contender", name] for name in CONTENDERS}, rounds=asked.rounds)
    shown = show(figures)
    path = save(f"merge_vs_peft_{asked.family}", {"figures": figures, "table": shown}, packages=("torch", "transformers", "peft"))
    print(shown)
    print(f"wrote {path}", file=sys.stderr)


def show(figures: dict[str, Figures]) -> str:
    """The figures, and their ratios to PEFT's and to the copy's."""
    peft, plain = figures["PEFT"], figures["a copy"]
    rows = [
        (name, f"{f['seconds']:.2f}", f"{f['seconds'] / peft['seconds']:.2f}", f"{f['seconds'] / plain['seconds']:.2f}", f"{f['cpu_seconds']:.2f}",
         f"{f['peak_gb']:.2f}", f"{f['peak_gb'] / peft['peak_gb']:.2f}")
        for name, f in figures.items()
    ]  # fmt: skip
    return table(("", "seconds", "to PEFT's", "to the copy's", "CPU seconds", "peak GB", "to PEFT's"), rows)


def _nemotune(base: Path, adapter: Path, out: Path) -> None:
    from nemotune.export.merge import merge

    merge(base, adapter, out)


def _imports(base: Path, adapter: Path, out: Path) -> None:
    import nemotune.export.merge  # noqa: F401

    out.mkdir()


def _peft(base: Path, adapter: Path, out: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), str(adapter))
    model.merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    _sync(out)


def copy(base: Path, adapter: Path, out: Path) -> None:
    shutil.copytree(base, out)
    _sync(out)


def _sync(directory: Path) -> None:
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


STEPS = {"nemotune": _nemotune, "its imports alone": _imports, "PEFT": _peft, "a copy": copy}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with nemotron/tokenizer")
    parser.add_argument("--family", choices=("llama", "nemotron_h"), default="nemotron_h")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    parser.add_argument("--work", type=Path, default=Path("runs") / "benchmarks" / "export", help="where models are kept")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
