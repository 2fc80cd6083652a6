"""From a base and an adapter to a quantised GGUF file: nemotune's one step, and PEFT's merge + convert_hf_to_gguf + llama-quantize, in turn.

    python -m benchmarks.gguf_vs_llama_cpp --data DIR [--llama-cpp DIR] [--family llama] [--rounds 1]

--data is a folder with nemotron/tokenizer and nemotron/chat_templates; --llama-cpp is a tree of llama.cpp with convert_hf_to_gguf.py and
build/bin/llama-quantize (its script wants sentencepiece), without which nemotune is measured alone. Everything is measured from outside, imports included; both sides end
with a file that has the same tensors, which is checked. nemotune reads its file back and, with the extra `llama-cpp`, has llama.cpp compute
from it and compares; the peer does neither, so it is also measured without that. Disk is the most that lay in the working directory, the base and the adapter aside.
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

KINDS = ("q4_k_m", "q8_0")
OURS, UNRUN, THEIRS = "nemotune", "nemotune, not run by llama.cpp", "llama.cpp"


def main(argv: Sequence[str] | None = None) -> None:
    asked = _arguments(argv)
    work = asked.work / f"{asked.family}{'-small' if asked.small else ''}"
    kind, _, who = (asked.contender or "").partition(" ")
    if asked.step:
        _export(work / "base", work / "adapter", work / f"ours-{kind}" / "model.gguf", kind, is_run=who == OURS)
        return
    words = ["--family", asked.family, "--work", str(asked.work), *["--small"] * asked.small]
    words += ["--llama-cpp", str(asked.llama_cpp)] if asked.llama_cpp else []
    command = [sys.executable, "-m", "benchmarks.gguf_vs_llama_cpp", *words]
    if asked.contender:
        out = work / f"{'theirs' if who == THEIRS else 'ours'}-{kind}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        is_theirs = who == THEIRS
        commands = _theirs(work, out, kind, asked) if is_theirs else [[*command, "--contender", asked.contender, "--step"]]
        print(json.dumps(watched(commands, out, env={"PYTHONPATH": _with_gguf_of(asked.llama_cpp)} if is_theirs else None)))
        return
    from benchmarks.exported import write_base_and_adapter

    write_base_and_adapter(asked.family, work, nemotron=asked.data / "nemotron", small=asked.small)
    contenders = [f"{kind} {who}" for kind in KINDS for who in (OURS, UNRUN, THEIRS)[: 3 if asked.llama_cpp else 2]]
    figures = in_turn({name: [*command, "--contender", name] for name in contenders}, rounds=asked.rounds)
    if asked.llama_cpp:
        for kind in KINDS:
            _require_same(work / f"ours-{kind}" / "model.gguf", work / f"theirs-{kind}" / "model.gguf")
    shown = show(figures)
    path = save(
        f"gguf_vs_llama_cpp_{asked.family}", {"figures": figures, "table": shown}, packages=("torch", "transformers", "peft", "gguf")
    )
    print(shown)
    print(f"wrote {path}", file=sys.stderr)


def show(figures: dict[str, Figures]) -> str:
    """The figures and, where the peer was measured, their ratios to its."""
    rows = []
    for name, f in figures.items():
        peer = figures.get(f"{name.partition(' ')[0]} {THEIRS}")
        row = [name]
        for key in ("seconds", "cpu_seconds", "peak_gb", "disk_gb"):
            row += [f"{f[key]:.2f}", f"{f[key] / peer[key]:.2f}" if peer else ""]
        rows.append(row)
    return table(("", "seconds", "ratio", "CPU seconds", "ratio", "peak GB", "ratio", "disk GB", "ratio"), rows)


def _export(base: Path, adapter: Path, out: Path, kind: str, *, is_run: bool) -> None:
    from nemotune.export.gguf import llama_cpp
    from nemotune.export.gguf.plan import plan_gguf
    from nemotune.export.stream import write
    from nemotune.export.tuned import open_tuned

    if not is_run:  # as where the extra is not installed
        llama_cpp.is_installed = lambda: False
    write(plan_gguf(open_tuned(base, adapter), kind), out, overwrite=True)


def _theirs(work: Path, out: Path, kind: str, asked: argparse.Namespace) -> list[list[str]]:
    merge = [
        sys.executable,
        "-m",
        "benchmarks.merge_vs_peft",
        "--family",
        asked.family,
        "--work",
        str(asked.work),
        *["--small"] * asked.small,
    ]
    llama_cpp, merged, f16 = asked.llama_cpp.resolve(), out / "merged", out / "f16.gguf"
    return [
        [*merge, "--step", "PEFT", "--out", str(merged)],
        [sys.executable, str(llama_cpp / "convert_hf_to_gguf.py"), str(merged), "--outtype", "f16", "--outfile", str(f16)],
        [str(llama_cpp / "build" / "bin" / "llama-quantize"), str(f16), str(out / "model.gguf"), kind, str(os.cpu_count())],
    ]


def _with_gguf_of(llama_cpp: Path) -> str:
    """The path with the gguf package that belongs to the tree."""
    return os.pathsep.join([str(llama_cpp.resolve() / "gguf-py"), *filter(None, [os.environ.get("PYTHONPATH")])])


def _require_same(ours: Path, theirs: Path) -> None:
    """The same tensors in the same types and shapes; bytes differ only where PEFT's sums round otherwise than ours."""
    from gguf import GGUFReader

    found = [{t.name: (t.tensor_type.name, tuple(t.shape.tolist())) for t in GGUFReader(path).tensors} for path in (ours, theirs)]
    if found[0] != found[1]:
        raise SystemExit(f"{ours} and {theirs} differ in {sorted(set(found[0].items()) ^ set(found[1].items()))[:4]}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with nemotron/tokenizer")
    parser.add_argument("--llama-cpp", type=Path, help="a tree of llama.cpp, built")
    parser.add_argument("--family", choices=("llama", "nemotron_h"), default="nemotron_h")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    parser.add_argument("--work", type=Path, default=Path("runs") / "benchmarks" / "export", help="where models are kept")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
