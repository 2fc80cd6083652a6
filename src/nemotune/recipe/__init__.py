"""The recipe: what one run does, typed. No torch here.

`schema.py` has every field with its default, `load.py` makes a recipe from YAML and overrides, `explain.py` words what does
not fit, `support.py` says which values the code cannot carry out today, `builtin/` holds the recipes that ship.
"""

from __future__ import annotations

from nemotune.recipe.load import builtin_names, dump, json_schema, load
from nemotune.recipe.schema import (
    Data,
    Engine,
    Evaluate,
    Export,
    Format,
    GgufType,
    Logging,
    Lora,
    Method,
    Model,
    Parallel,
    Recipe,
    Source,
    Task,
    Tracker,
    Train,
)

__all__ = [
    "Data", "Engine", "Evaluate", "Export", "Format", "GgufType", "Logging", "Lora", "Method", "Model", "Parallel", "Recipe",
    "Source", "Task", "Tracker", "Train", "builtin_names", "dump", "json_schema", "load",
]  # fmt: skip
