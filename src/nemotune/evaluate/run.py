"""`run`: one model through the recipe's tasks on the held-out rows, into eval/<label>.jsonl.

Which rows is decided by the recipe alone, so the base and the tuned model answer the same ones; compare.py sets them side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from nemotune.data.megatron.blend import read_blends
from nemotune.data.prepare import Prepared
from nemotune.data.split import Split
from nemotune.data.template import Renderer
from nemotune.errors import DataError, RecipeError
from nemotune.evaluate import multiple_choice, perplexity, span_qa, tool_calls
from nemotune.evaluate.candidate import Candidate
from nemotune.evaluate.compare import summarize
from nemotune.evaluate.rows import HeldOut, Row, hold_out, write_rows
from nemotune.files import write_json
from nemotune.models import CausalLM
from nemotune.recipe import Recipe

__all__ = ["TASKS", "Summary", "asked_line", "check_recipe", "check_rows", "run"]

Summary = dict[str, dict[str, dict[str, float]]]  # {task: {metric: {"value", "n"}}}

TASKS: dict[str, Callable[[Candidate, HeldOut], list[Row]]] = {
    "multiple_choice": multiple_choice.score,
    "tool_calls": tool_calls.score,
    "span_qa": span_qa.score,
    "perplexity": perplexity.score,
}
FORMATS = {"multiple_choice": ("medmcqa",), "tool_calls": ("glaive", "chat"), "span_qa": ("squad",)}  # data.format, where a task needs one
NEEDS: dict[str, Callable[[HeldOut, Renderer], Sequence[object]]] = {
    "multiple_choice": multiple_choice.askable,
    "tool_calls": tool_calls.askable,
    "span_qa": span_qa.askable,
    "perplexity": perplexity.askable,
}


def check_recipe(recipe: Recipe) -> None:
    """Refuse tasks that the recipe alone shows to be without rows of their kind. Raises RecipeError."""
    data, tasks = recipe.data, recipe.evaluate.tasks
    problems = [
        f"evaluate.tasks: {task} needs data.format: {' or '.join(FORMATS[task])}, got {data.format}; choose another task"
        for task in tasks
        if data.format not in FORMATS.get(task, (data.format,))
    ]
    blend_holds_out = data.format == "megatron" and len(read_blends(data)) > 1
    if tasks and not (data.test or data.validation or blend_holds_out):
        problems.append(
            f"evaluate.tasks: got {', '.join(tasks)}, and no held-out rows to ask: set data.test=0.02 or give it rows of its own, "
            "or evaluate.tasks=[] for no evaluation"
        )
    if problems:
        raise RecipeError("\n".join(problems))


def check_rows(recipe: Recipe, prepared: Prepared, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse, before anything is trained, tasks that the held-out rows cannot serve. Raises DataError."""
    held_out, renderer = _held_out(recipe, prepared), _renderer(recipe, tokenizer)
    for task in recipe.evaluate.tasks:
        NEEDS[task](held_out, renderer)


def run(model: CausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, prepared: Prepared, *, label: str, out_dir: Path) -> Summary:
    """Score `model`, write `out_dir/<label>.jsonl` and which rows were asked, and return every metric of every task.

    Asked are `evaluate.max_samples` rows of the test split, or of the validation split where there is none. Raises DataError without either.
    """
    held_out = _held_out(recipe, prepared)
    candidate = Candidate(model, _renderer(recipe, tokenizer), label=label, max_new_tokens=recipe.evaluate.max_new_tokens)
    rows = [row for task in recipe.evaluate.tasks for row in TASKS[task](candidate, held_out)]
    (out_dir / "compare.json").unlink(missing_ok=True)  # it speaks of rows that are about to be replaced
    write_rows(out_dir / f"{label}.jsonl", rows)
    write_json(out_dir / "asked.json", _asked(recipe, prepared))
    return summarize(rows)


def _asked(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    """Which rows an evaluation asks: so many ("rows") "of" those of a "split". Raises DataError where none is held out."""
    split = _split(prepared)
    rows = prepared.stats["splits"][split.name]["rows"]
    return {"split": split.name, "rows": min(rows, recipe.evaluate.max_samples or rows), "of": rows}


def asked_line(recipe: Recipe, prepared: Prepared) -> str:
    """The same in words."""
    found = _asked(recipe, prepared)
    return f"asked: {found['rows']:,} of {found['of']:,} rows of {found['split']}"


def _held_out(recipe: Recipe, prepared: Prepared) -> HeldOut:
    return hold_out(_split(prepared), max_samples=recipe.evaluate.max_samples, seed=recipe.train.seed)


def _renderer(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Renderer:
    # train_on: all would make the question part of the answer
    return Renderer(tokenizer, template=recipe.data.template, thinking=recipe.data.thinking, train_on="assistant")


def _split(prepared: Prepared) -> Split:
    for split in (prepared.test, prepared.validation):
        if split is not None and len(split):
            return split
    raise DataError(
        "data.test: got none, and no data.validation either, expected held-out rows to evaluate on; set data.test=0.02 or give it rows of its own"
    )
