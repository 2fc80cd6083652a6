"""The stages of `nemotune eval`: the tuned model against its base, or one model alone. How a model is asked is in `nemotune.evaluate`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from rich.console import Console

from nemotune.data.prepare import Prepared
from nemotune.engines import native
from nemotune.errors import ConflictError, MissingFileError, RecipeError
from nemotune.evaluate import Summary, asked_line, check_recipe, check_rows, compare_files, comparison_table, summary_table
from nemotune.evaluate import run as run_evaluation
from nemotune.files import staged_directory
from nemotune.lora import load_adapter
from nemotune.models import CausalLM, load_model, load_tokenizer, locate
from nemotune.recipe import Recipe
from nemotune.workflow.messages import say, wrote
from nemotune.workflow.preparing import prepare_rows
from nemotune.workflow.run_dir import discard, is_begun, require_same_model


def evaluate(recipe: Recipe, *, run_dir: Path, overwrite: bool, dry_run: bool, console: Console, alone: bool = True) -> None:
    """Score the tuned model, and its base if asked, on the held-out rows; compare the two. One model is in memory at a time."""
    eval_dir, trained = run_dir / "eval", run_dir / native.trained_name(recipe)
    _refuse_evaluation(recipe)
    if eval_dir.is_dir() and not overwrite:
        raise ConflictError(f"{eval_dir}: holds an evaluation already; --overwrite replaces it")
    if not trained.is_dir():
        raise MissingFileError(f"{trained}: nothing trained yet; `nemotune train` comes first")
    if dry_run:
        say(console, f"would evaluate {', '.join(recipe.evaluate.tasks)} into {eval_dir}")
        return
    prepared = _prepared(run_dir)
    require_same_model(recipe, run_dir, fingerprint=prepared.fingerprint)
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
    baseline = recipe.evaluate.baseline and recipe.model.weights == "pretrained"
    with staged_directory(eval_dir, overwrite=True) as aside:

        def ask(model: CausalLM, label: str) -> Summary:
            return run_evaluation(model.eval(), tokenizer, recipe, prepared, label=label, out_dir=aside)

        if recipe.method == "lora":
            model = native.load_base(recipe)
            if baseline:
                ask(model, "base")
            load_adapter(model, trained)
        else:
            if baseline:
                ask(native.load_base(recipe), "base")
            model = load_model(trained, dtype=recipe.model.dtype, device=native.default_device())
        summary = ask(model, "tuned")
        compared = compare_files(aside, seed=recipe.train.seed) if baseline else None
    discard(run_dir, ("report.html",))  # it shows the evaluation before this one
    console.print(comparison_table(compared) if compared else summary_table(summary, label="tuned"))
    say(console, asked_line(recipe, prepared))
    wrote(console, eval_dir, then=f"nemotune report {quote(str(run_dir))}" if alone else None)


def score(recipe: Recipe, *, run_dir: Path, model: str, overwrite: bool, dry_run: bool, console: Console) -> None:
    """Score one model alone, a base or a merged one, on the recipe's held-out rows, which are prepared first where they are not there."""
    scores_dir = run_dir / "scores" / Path(model).resolve().name
    _refuse_evaluation(recipe)
    if scores_dir.is_dir() and not overwrite:
        raise ConflictError(f"{scores_dir}: holds scores already; --overwrite replaces them")
    directory = locate(model, recipe.model.revision if model == recipe.model.path else None, weights=not dry_run)
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
    if load_tokenizer(directory).get_vocab() != tokenizer.get_vocab():
        raise ConflictError(
            f"--model: {model} has another tokenizer than the recipe's model.path ({recipe.model.path}); score it with model.path={model} as well"
        )
    if dry_run:
        say(console, f"would score {model} into {scores_dir}")
        return
    prepared = prepare_rows(recipe, run_dir, show=0, overwrite=False, console=console, alone=False)
    check_rows(recipe, prepared, tokenizer)
    loaded = load_model(directory, dtype=recipe.model.dtype, device=native.default_device()).eval()
    with staged_directory(scores_dir, overwrite=True) as aside:
        summary = run_evaluation(loaded, tokenizer, recipe, prepared, label="model", out_dir=aside)
    console.print(summary_table(summary, label=scores_dir.name))
    say(console, asked_line(recipe, prepared))
    wrote(console, scores_dir, then=f"nemotune {'report' if is_begun(run_dir) else 'train'} {quote(str(run_dir))}")


def _refuse_evaluation(recipe: Recipe) -> None:
    if not recipe.evaluate.tasks:
        raise RecipeError("evaluate.tasks: got none, so there is nothing to evaluate; name one, such as evaluate.tasks=[perplexity]")
    check_recipe(recipe)


def _prepared(run_dir: Path) -> Prepared:
    if not (run_dir / "data" / "stats.json").is_file():
        raise MissingFileError(f"{run_dir / 'data'}: no prepared data; `nemotune data` comes first")
    return Prepared.load(run_dir / "data")
