"""The machine and the installed packages: what `nemotune doctor` prints and what a run keeps in environment.json.

Only what is there is told; whether a recipe fits is another question.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["describe", "notes", "rows"]

REQUIRED = (
    "torch",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "safetensors",
    "gguf",
    "datasets",
    "pyarrow",
    "numpy",
    "pydantic",
    "typer",
    "rich",
    "pyyaml",
    "tensorboard",
    "jinja2",
)
OPTIONAL = {
    "bitsandbytes": "8-bit AdamW on NVIDIA GPUs",
    "torchao": "8-bit AdamW",
    "xllamacpp": "running GGUF files after they are written: pip install 'nemotune[llama-cpp]'",
    "peft": "the adapter parity tests",
}
GIB = 1024**3


def describe() -> dict[str, Any]:
    """Everything that a bug report needs, as JSON-able values; sizes in bytes, versions null where a package is missing."""
    import torch

    from nemotune import __version__

    return {
        "nemotune": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "cuda": torch.version.cuda,
        "devices": _devices(),
        "packages": {name: _version(name) for name in REQUIRED},
        "optional": {name: _version(name) for name in OPTIONAL},
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """`describe()` as lines of a table."""
    devices = [f"{device['name']}, {device['memory_bytes'] / GIB:.0f} GiB" for device in found["devices"]]
    return [
        ("nemotune", f"{found['nemotune']}, Python {found['python']}"),
        ("platform", found["platform"]),
        ("processor", f"{found['cpus']} cores, torch uses {found['threads']} threads"),
        ("memory", f"{found['memory_bytes'] / GIB:.1f} GiB"),
        ("disk free here", f"{found['disk_free_bytes'] / GIB:.1f} GiB"),
        ("GPU", "; ".join(devices) or "none: torch computes on the CPU"),
        *((name, version or "missing") for name, version in found["packages"].items()),
        *((f"{name} (optional)", version or f"not installed; for {OPTIONAL[name]}") for name, version in found["optional"].items()),
    ]


def notes(found: dict[str, Any]) -> list[str]:
    """What is likely to be in the way, each with a remedy."""
    missing = [name for name, version in found["packages"].items() if version is None]
    told = [f"missing: {', '.join(missing)}; install them with `pip install nemotune`"] if missing else []
    if found["disk_free_bytes"] < 5 * GIB:
        told.append(f"{found['disk_free_bytes'] / GIB:.1f} GiB free here: prepared data, checkpoints and a merged model may not fit")
    if not found["devices"] and shutil.which("nvidia-smi"):
        told.append("an NVIDIA driver is here, yet torch sees no GPU: this is torch's CPU build, or CUDA_VISIBLE_DEVICES hides the GPU")
    return told


def _devices() -> list[dict[str, Any]]:
    import torch

    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": found.name, "memory_bytes": found.total_memory, "capability": f"{found.major}.{found.minor}"} for found in properties]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
