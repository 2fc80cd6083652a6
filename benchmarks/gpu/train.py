"""LoRA on Nano-30B at full size with random weights: nemotune in bf16 and NF4 against transformers with PEFT, on one GPU of 140 GB.

    python -m benchmarks.gpu.train [--only native-bf16-4096 ...] [--checkpointing full] [--experts] [--profile] [--small]

A step is one packed row. Tokens a second are those of documents; the share is `lora_step_flops` (roofline.py: 4 operations per frozen
active parameter and token, 6 per adapter's, and the products of attention and scan) a second over a large bf16 product's on the same
device. Routing is the random router's own. Each part is a process of its own and ends inside ten minutes; figures of earlier parts stay
in the file, each with its device, date and setting. transformers holds the stacked experts wide under bitsandbytes, so NF4 has no peer.
`--small` tries all of it on a CPU, and keeps those figures in a file of their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from typing import Any

import torch

from benchmarks import harness
from benchmarks.gpu import native
from benchmarks.gpu.setting import Setting
from benchmarks.roofline import Clock, lora_step_flops, matmul_ceiling

PARTS = [f"{contender}-{sequence}" for sequence in (4096, 16384) for contender in ("native-bf16", "native-nf4", "peft-bf16")]
PACKAGES = ("torch", "transformers", "peft")
COLUMNS = {
    "tokens/s": "tokens_per_second", "share of a bf16 product": "share", "peak GB": "device_peak_gb", "weights GB": "weights_gb",
    "padding": "padding", "step s": "step_seconds", "forward": "forward_seconds", "backward": "backward_seconds", "optimiser": "optimizer_seconds",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    asked = _arguments(argv)
    parts = asked.only or PARTS
    if len(parts) > 1:
        given = [word for word in (argv or sys.argv[1:]) if word not in (*parts, "--only")]
        harness.in_turn({part: [sys.executable, "-m", "benchmarks.gpu.train", *given, "--only", part] for part in parts}, rounds=1)
        print(show(kept(small=asked.small)))
        return
    keys = ("small", "device", "experts", "checkpointing", "warmup_steps", "steps")
    setting = Setting(part=parts[0], **{key: getattr(asked, key) for key in keys})
    figures = measure(setting, profile=asked.profile)
    name = f"{setting.part}{'-experts' if setting.experts else ''}, {setting.checkpointing}"
    device = torch.cuda.get_device_name() if setting.device == "cuda" else "cpu"
    row = figures | {"device": device, "date": date.today().isoformat(), "setting": asdict(setting)}
    all_figures = kept(small=setting.small) | {name: row}
    installed = [package for package in PACKAGES if importlib.util.find_spec(package)]
    path = harness.save(_file(setting.small), {"figures": all_figures, "table": show(all_figures)}, packages=installed)
    print(show({name: row}), f"wrote {path}", sep="\n", file=sys.stderr)
    print(json.dumps(figures))


def measure(setting: Setting, *, profile: bool = False) -> dict[str, float]:
    """The figures of one part; `out_of_memory` alone where the device has too little."""
    clock = Clock(setting.device, seconds=0.1 if setting.small else 2.0)
    ceiling = matmul_ceiling(clock, torch.bfloat16, size=256 if setting.small else 8192)
    try:
        found = _contender(setting, clock, profile)
    except torch.OutOfMemoryError as error:
        print(error, file=sys.stderr)
        return {"out_of_memory": 1.0}
    tokens = sum(batch.num_tokens for batch in setting.measured)
    flops = sum(lora_step_flops(setting.config, setting.lora, batch) for batch in setting.measured)
    return found | {
        "tokens_per_second": tokens / found["seconds"], "step_seconds": found["seconds"] / setting.steps,
        "flops_per_token": flops / tokens, "matmul_tflops": ceiling / 1e12, "share": flops / found["seconds"] / ceiling,
    }  # fmt: skip


def _contender(setting: Setting, clock: Clock, profile: bool) -> dict[str, float]:
    if setting.contender == "native":
        return native.measure(setting, clock, profile=profile)
    from benchmarks.gpu import with_peft  # PEFT may be missing where nemotune alone is measured

    return with_peft.measure(setting, clock)


def _file(small: bool) -> str:
    return "gpu.train.small" if small else "gpu.train"


def kept(*, small: bool = False) -> dict[str, dict]:
    """The figures of the parts measured so far."""
    path = harness.RESULTS / f"{_file(small)}.json"
    return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.is_file() else {}


def show(figures: dict[str, dict]) -> str:
    """A row per part."""
    rows = [
        (name, *(_cell(found, key) for key in COLUMNS.values()), str(found["setting"]["steps"]), found["device"])
        for name, found in figures.items()
    ]
    return harness.table(("part, checkpointing", *COLUMNS, "steps", "device"), rows)


def _cell(found: dict[str, Any], key: str) -> str:
    if "out_of_memory" in found:
        return "out of memory" if key == "device_peak_gb" else ""
    if key not in found:
        return ""
    return f"{found[key]:.0%}" if key in ("share", "padding") else f"{found[key]:.3g}" if "seconds" in key else f"{found[key]:,.1f}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts; one alone runs in this process")
    parser.add_argument(
        "--checkpointing", choices=("none", "selective", "full", "offload"), default="selective", help="transformers': on unless none"
    )
    parser.add_argument("--experts", action="store_true", help="adapt the routed experts too")
    parser.add_argument("--profile", action="store_true", help="print the kernels that take most of a step (nemotune)")
    parser.add_argument("--warmup-steps", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--small", action="store_true", help="a model of a few thousand parameters on the CPU, rows 64 times shorter")
    asked = parser.parse_args(argv)
    asked.device = "cpu" if asked.small else "cuda"
    return asked


if __name__ == "__main__":
    main()
