"""What a recipe may say and the code cannot carry out yet, each with what to do instead.

This is the one list: `check` refuses by it, before anything is downloaded or written, and the README's table is held against it
by a test. A feature that is built leaves the list. Values that are wrong in themselves are refused by `schema.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemotune.errors import UnsupportedError
from nemotune.recipe.schema import Recipe

__all__ = ["LIMITS", "Limit", "check", "refused"]

_MODEL = ("run", "plan", "train", "eval")
_TRAIN = ("run", "plan", "train")
_EVALUATE = ("run", "eval")


@dataclass(frozen=True)
class Limit:
    """A part of the recipe (`key`), which of its values are not built (`what`), and `instead`; `verbs` are those that need it."""

    key: str
    what: str
    instead: str
    verbs: tuple[str, ...]
    asked: Callable[[Any], bool]

    def value(self, recipe: Recipe) -> Any:
        """What the recipe says at `key`."""
        found: Any = recipe
        for part in self.key.split("."):
            found = getattr(found, part)
        return found


LIMITS = (
    Limit("train.compile", "torch.compile", "train.compile=false", _TRAIN, bool),
    Limit("engine.name", "trl, unsloth, automodel, megatron", "engine.name=native", _TRAIN, lambda v: v != "native"),
    Limit("engine.python", "an engine's own interpreter", "engine.python=null", _TRAIN, lambda v: v is not None),
    Limit("evaluate.tasks", "semantic_similarity", "evaluate.tasks=[perplexity]", _EVALUATE, lambda v: "semantic_similarity" in v),
    Limit("evaluate.backend", "nemo_evaluator", "evaluate.backend=native", _EVALUATE, lambda v: v != "native"),
    Limit("export.adapter", "a run that leaves no adapter", "export.adapter=true", _TRAIN, lambda v: not v),
    Limit("logging.trackers", "wandb, mlflow", "logging.trackers=[tensorboard]", _TRAIN, lambda v: not {"wandb", "mlflow"}.isdisjoint(v)),
)


def refused(recipe: Recipe, *, verb: str = "run") -> list[Limit]:
    """The limits that `verb` on this recipe runs into, in the recipe's order."""
    return [limit for limit in LIMITS if verb in limit.verbs and limit.asked(limit.value(recipe))]


def check(recipe: Recipe, *, verb: str = "run") -> None:
    """Raises UnsupportedError naming everything in the recipe that `verb` needs and that is not built yet."""
    limits = refused(recipe, verb=verb)
    if limits:
        raise UnsupportedError("\n".join(f"{limit.key}: not built yet: {limit.what}. Use {limit.instead}." for limit in limits))
