"""nemotune: rows of your own to a tuned, evaluated and exported NVIDIA Nemotron.

The two functions below are the door for library use; they import torch when they are first asked for. The command line
is in `cli/`, what a run does from start to end in `workflow/`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemotune.models import load_model, load_tokenizer

__all__ = ["__version__", "load_model", "load_tokenizer"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("load_model", "load_tokenizer"):
        return getattr(import_module("nemotune.models"), name)
    raise AttributeError(f"module 'nemotune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
