"""Between Hugging Face and Megatron checkpoints: an import, an export back, and a plain copy of the model's files to the same disk, in turn.

    python -m benchmarks.convert_megatron --data DIR [--family llama] [--rounds 3]

DIR is a folder with nemotron/tokenizer and nemotron/chat_templates. Everything is measured from outside and ends when the bytes are on the
disk; imports of Python modules count. What is written is read back in part, as without `--verify`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Figures, in_turn, save, table
from benchmarks.merge_vs_peft import copy as copied
from benchmarks.watch import watched

CONTENDERS = ("import", "export", "imports of Python modules alone", "a copy")


def main(argv: Sequence[str] | None = None) -> None:
    asked = _arguments(argv)
    work = asked.work / f"{asked.family}{'-small' if asked.small else ''}"
    if asked.step:
        STEPS[asked.step](work)
        return
    command = [
        sys.executable,
        "-m",
        "benchmarks.convert_megatron",
        "--family",
        asked.family,
        "--work",
        str(asked.work),
        *["--small"] * asked.small,
    ]
    if asked.contender:
        out = work / OUT[asked.contender]
        shutil.rmtree(out, ignore_errors=True)
        print(json.dumps(watched([[*command, "--step", asked.contender]], out)))
        return
    from benchmarks.exported import write_base_and_adapter

    write_base_and_adapter(asked.family, work, nemotron=asked.data / "nemotron", small=asked.small)
    figures = in_turn({name: [*command, "--contender", name] for name in CONTENDERS}, rounds=asked.rounds)
    shown = show(figures)
    path = save(f"convert_megatron_{asked.family}", {"figures": figures, "table": shown}, packages=("torch",))
    print(shown)
    print(f"wrote {path}", file=sys.stderr)


def show(figures: dict[str, Figures]) -> str:
    """The figures, and the ratio of their seconds to the copy's."""
    copy = figures["a copy"]["seconds"]
    rows = [
        (name, f"{f['seconds']:.2f}", f"{f['seconds'] / copy:.2f}", f"{f['cpu_seconds']:.2f}", f"{f['peak_gb']:.2f}")
        for name, f in figures.items()
    ]
    return table(("", "seconds", "to the copy's", "CPU seconds", "peak GB"), rows)


def _import(work: Path) -> None:
    from nemotune.export.megatron.to_megatron import plan_import
    from nemotune.export.stream import write
    from nemotune.export.tuned import open_tuned

    write(plan_import(open_tuned(work / "base")), work / OUT["import"])


def _export(work: Path) -> None:
    from nemotune.export.megatron.checkpoint import open_megatron
    from nemotune.export.megatron.to_hf import open_export
    from nemotune.export.stream import write

    write(open_export(open_megatron(work / OUT["import"]), work / "base").plan(), work / OUT["export"])


def _imports(work: Path) -> None:
    import nemotune.export.megatron.to_hf
    import nemotune.export.megatron.to_megatron  # noqa: F401

    (work / OUT["imports of Python modules alone"]).mkdir()


STEPS = {
    "import": _import,
    "export": _export,
    "imports of Python modules alone": _imports,
    "a copy": lambda work: copied(work / "base", work / "adapter", work / OUT["a copy"]),
}
OUT = {"import": "megatron", "export": "back", "imports of Python modules alone": "nothing", "a copy": "copy"}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with nemotron/tokenizer")
    parser.add_argument("--family", choices=("llama", "nemotron_h"), default="nemotron_h")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    parser.add_argument("--work", type=Path, default=Path("runs") / "benchmarks" / "export", help="where models are kept")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--step", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
