"""Each stage of a run, and `run`, which does them in order: data, plan, train, eval, export, report.

Stages meet through files in the run directory, so each runs alone and any one can be done again.
"""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from rich.console import Console
from rich.markup import escape

from nemotune.data import preview
from nemotune.data.prepare import Prepared, prepare
from nemotune.data.progress import progress
from nemotune.data.sources import require_sources
from nemotune.engines import native
from nemotune.errors import ConflictError, MissingFileError, RecipeError, UnsupportedError
from nemotune.evaluate import Summary, asked_line, check_recipe, check_rows, compare_files, comparison_table, summary_table
from nemotune.evaluate import run as run_evaluation
from nemotune.export.merge import merge as merge_files
from nemotune.export.merge import plan_merge
from nemotune.files import staged_directory
from nemotune.lora import load_adapter
from nemotune.models import CausalLM, load_model, load_tokenizer, locate
from nemotune.plan.cost import cost_line, coverage_table, estimate
from nemotune.recipe import Recipe
from nemotune.train import Deadline
from nemotune.train.checkpoint import Checkpoints
from nemotune.workflow.run_dir import FROM_TRAINED, discard, held, is_begun, open_run, record, refuse_begun, require_same_model


def run(
    recipe: Recipe, *, run_dir: Path, resume: bool, overwrite: bool, dry_run: bool, console: Console, started: float | None = None
) -> None:
    """The whole run. With `dry_run`, the plan and the list of what would be written. Its deadline counts from `started`, or from now."""
    check_recipe(recipe)
    refuse_begun(run_dir, resume=resume, overwrite=overwrite)
    merged = recipe.export.merged and recipe.method == "lora"
    if dry_run:
        require_sources(recipe)
        plan(recipe, console=console)
        later = ["eval"] * bool(recipe.evaluate.tasks) + ["export"] * merged + ["report.html"]
        _say(console, f"would write {run_dir}/: data, metrics.jsonl, checkpoints, {', '.join([native.trained_name(recipe), *later])}")
        return
    deadline = Deadline.of(recipe, started=started)
    console.rule(escape(f"{recipe.name} in {run_dir}"), align="left")
    native.require_device(recipe)
    estimate(recipe)  # a target or a config that does not fit is told before the rows are read
    prepared = _prepare(recipe, run_dir, show=0, overwrite=overwrite, console=console, alone=False)
    if recipe.evaluate.tasks:
        check_rows(recipe, prepared, load_tokenizer(recipe.model.path, recipe.model.revision))
    plan(recipe, console=console)
    _train(recipe, prepared, run_dir, resume=resume, overwrite=overwrite, deadline=deadline, console=console, alone=False)
    if recipe.evaluate.tasks and _is_in_time(deadline, f"nemotune eval {quote(str(run_dir))}", console=console):
        evaluate(recipe, run_dir=run_dir, overwrite=True, dry_run=False, console=console, alone=False)
    if merged and _is_in_time(deadline, f"nemotune merge {quote(str(run_dir))}", console=console):
        merge(recipe, run_dir=run_dir, output=None, overwrite=True, dry_run=False, console=console, alone=False)
    report(run_dir, console=console)


def data(recipe: Recipe, *, run_dir: Path, show: int, overwrite: bool, dry_run: bool, console: Console) -> None:
    """Prepare the rows into `run_dir/data` and show what they became."""
    if dry_run:
        require_sources(recipe)
        _say(console, f"would prepare {recipe.data.train.path} into {run_dir / 'data'}")
        return
    _prepare(recipe, run_dir, show=show, overwrite=overwrite, console=console)


def plan(recipe: Recipe, *, console: Console) -> None:
    """What the recipe trains and what it holds in memory."""
    cost = estimate(recipe)
    if recipe.method == "lora":
        console.print(coverage_table(cost.coverage))
    console.print(cost_line(cost))


def train(
    recipe: Recipe, *, run_dir: Path, resume: bool, overwrite: bool, dry_run: bool, console: Console, started: float | None = None
) -> None:
    """Train on the prepared rows, preparing them first where they are not there."""
    refuse_begun(run_dir, resume=resume, overwrite=overwrite)
    if dry_run:
        require_sources(recipe)
        plan(recipe, console=console)
        _say(console, f"would write {run_dir / native.trained_name(recipe)}")
        return
    deadline = Deadline.of(recipe, started=started)
    native.require_device(recipe)
    estimate(recipe)
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
    prepared = prepare(recipe, tokenizer, out_dir=run_dir / "data", overwrite=overwrite)
    _train(recipe, prepared, run_dir, resume=resume, overwrite=overwrite, deadline=deadline, console=console)


def evaluate(recipe: Recipe, *, run_dir: Path, overwrite: bool, dry_run: bool, console: Console, alone: bool = True) -> None:
    """Score the tuned model, and its base if asked, on the held-out rows; compare the two. One model is in memory at a time."""
    eval_dir, trained = run_dir / "eval", run_dir / native.trained_name(recipe)
    _refuse_evaluation(recipe)
    if eval_dir.is_dir() and not overwrite:
        raise ConflictError(f"{eval_dir}: holds an evaluation already; --overwrite replaces it")
    if not trained.is_dir():
        raise MissingFileError(f"{trained}: nothing trained yet; `nemotune train` comes first")
    if dry_run:
        _say(console, f"would evaluate {', '.join(recipe.evaluate.tasks)} into {eval_dir}")
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
    _say(console, asked_line(recipe, prepared))
    _wrote(console, eval_dir, then=f"nemotune report {quote(str(run_dir))}" if alone else None)


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
        _say(console, f"would score {model} into {scores_dir}")
        return
    prepared = _prepare(recipe, run_dir, show=0, overwrite=False, console=console, alone=False)
    check_rows(recipe, prepared, tokenizer)
    loaded = load_model(directory, dtype=recipe.model.dtype, device=native.default_device()).eval()
    with staged_directory(scores_dir, overwrite=True) as aside:
        summary = run_evaluation(loaded, tokenizer, recipe, prepared, label="model", out_dir=aside)
    console.print(summary_table(summary, label=scores_dir.name))
    _say(console, asked_line(recipe, prepared))
    _wrote(console, scores_dir, then=f"nemotune {'report' if is_begun(run_dir) else 'train'} {quote(str(run_dir))}")


def merge(
    recipe: Recipe, *, run_dir: Path, output: Path | None, overwrite: bool, dry_run: bool, console: Console, alone: bool = True
) -> None:
    """Write base + adapter as a Hugging Face directory."""
    if recipe.method != "lora":
        raise UnsupportedError(f"method: {recipe.method} leaves a whole model in {run_dir / 'model'}; there is nothing to merge")
    adapter, target = run_dir / "adapter", output or run_dir / "export" / "merged"
    if not adapter.is_dir():
        raise MissingFileError(f"{adapter}: nothing trained yet; `nemotune train` comes first")
    if (run_dir / "recipe.json").is_file():
        require_same_model(recipe, run_dir)
    _refuse_target(target)
    base = locate(recipe.model.path, recipe.model.revision, weights=not dry_run)
    if base.resolve().is_relative_to(target.resolve()):
        raise ConflictError(f"--output: {target} holds the base, which --overwrite does not replace; name another directory")
    if dry_run and not any(base.glob("*.safetensors")):
        _say(console, f"would download the weights of {recipe.model.path} and write {target}")
        return
    planned = plan_merge(base, adapter)
    size = f"{planned.write.num_bytes / 1e9:.2f} GB, {len(planned.updates)} of {len(planned.write.tensors)} tensors updated"
    if dry_run:
        _say(console, f"would write {target}: {size}")
        return
    with progress("merging", total=planned.write.num_bytes) as advance:
        verified = merge_files(base, adapter, target, overwrite=overwrite, done=advance)
    _say(console, f"merged: {size}")
    _say(console, f"read back: {verified.updated} updated tensors are base + adapter, {verified.untouched} others have the base's bytes")
    if recipe.model.quantization == "nf4":
        scoring = f"nemotune eval {quote(str(run_dir))} --model {quote(str(target))}"
        _say(console, f"the adapter learned beside NF4 weights and was merged onto the wide ones: before it serves, `{scoring}`")
    _wrote(console, target, then=f"vllm serve {quote(str(target))}" if alone else None)


def report(run_dir: Path, *, console: Console) -> None:
    """Write report.html from what the run left."""
    from nemotune.evaluate.report import write_report

    write_report(run_dir)
    _wrote(console, run_dir / "report.html", then="open it in a browser")


def _refuse_evaluation(recipe: Recipe) -> None:
    if not recipe.evaluate.tasks:
        raise RecipeError("evaluate.tasks: got none, so there is nothing to evaluate; name one, such as evaluate.tasks=[perplexity]")
    check_recipe(recipe)


def _prepare(recipe: Recipe, run_dir: Path, *, show: int, overwrite: bool, console: Console, alone: bool = True) -> Prepared:
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision)
    prepared = prepare(recipe, tokenizer, out_dir=run_dir / "data", overwrite=overwrite)
    if not is_begun(run_dir):
        record(recipe, run_dir, fingerprint=prepared.fingerprint)
    preview.show(prepared, tokenizer, console, samples=show)
    _wrote(console, run_dir / "data", then=f"nemotune train {quote(str(run_dir))}" if alone else None)
    return prepared


def _train(
    recipe: Recipe, prepared: Prepared, run_dir: Path, *, resume: bool, overwrite: bool, deadline: Deadline, console: Console,
    alone: bool = True,
) -> None:  # fmt: skip
    """Train and keep the outcome; what an earlier outcome was evaluated, merged and reported as is removed."""
    notes = Console(stderr=True, soft_wrap=True)
    with held(run_dir):
        refuse_begun(run_dir, resume=resume, overwrite=overwrite)  # again: another process may have been faster
        if resume and not Checkpoints(run_dir, keep=1).latest():
            if (trained := run_dir / native.trained_name(recipe)).is_dir():
                raise ConflictError(f"{trained}: no checkpoint is left to go on from; --overwrite trains anew, name=... keeps both")
            _say(notes, f"no checkpoint in {run_dir} to resume from: begins with step 1")
        open_run(recipe, run_dir, fingerprint=prepared.fingerprint, resume=resume, overwrite=overwrite)
        result = native.train(recipe, prepared, run_dir=run_dir, resume=resume, console=notes, deadline=deadline)
        discard(run_dir, FROM_TRAINED)
    place, is_cut = quote(str(run_dir)), result.ended == "stopped at the deadline"
    goes_on = "; `--resume` goes on" if is_cut else ""
    console.print(f"{result.ended} after {result.steps} steps; the {result.weights} weights are kept{goes_on}")
    then = f"nemotune run {place} --resume" if is_cut else f"nemotune eval {place}" if alone else None
    _wrote(console, run_dir / native.trained_name(recipe), then=then)


def _is_in_time(deadline: Deadline, command: str, *, console: Console) -> bool:
    """Whether a stage may still begin; where the deadline has come, says what does it later."""
    if deadline.has_come():
        _say(console, f"left out, since train.deadline has come: `{command}` does it")
    return not deadline.has_come()


def _refuse_target(target: Path) -> None:
    """A merged model takes the place of a model, never of anything else, whatever the options."""
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise ConflictError(
            f"--output: {target} holds no model (no config.json), so --overwrite does not replace it; name another directory"
        )


def _prepared(run_dir: Path) -> Prepared:
    if not (run_dir / "data" / "stats.json").is_file():
        raise MissingFileError(f"{run_dir / 'data'}: no prepared data; `nemotune data` comes first")
    return Prepared.load(run_dir / "data")


def _wrote(console: Console, path: Path, *, then: str | None) -> None:
    """The line that a stage ends with; `then` is what to type next, where nothing goes on by itself."""
    following = f"   next: [bold]{escape(then)}[/]" if then else ""
    console.print(f"[green]wrote[/] {escape(str(path))}{following}", soft_wrap=True, highlight=False)


def _say(console: Console, text: str) -> None:
    """A line as it is: paths are neither wrapped nor read as markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
