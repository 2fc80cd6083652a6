"""What a run's directory tells of its model: recipe.json, environment.json, metrics.jsonl, data/stats.json, eval/compare.json -> a card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemotune import __version__, assets
from nemotune.data.sources import is_hub_id
from nemotune.evaluate.table import interval, number
from nemotune.export.hub.card import AdapterLoads, Card, Metric, shown_recipe
from nemotune.export.hub.contents import Kind
from nemotune.export.hub.license import Base
from nemotune.files import read_json
from nemotune.recipe import Recipe, Source, dump
from nemotune.train.metrics import read_metrics

VERSIONS = ("torch", "transformers", "safetensors")
EXPORT_AGAIN = "restore it, or run again with --overwrite"


def card_of(
    recipe: Recipe, run_dir: Path, *, repo: str, kind: Kind, base: Base, files: Sequence[str], adapter: AdapterLoads, in_ollama: bool = False
) -> Card:  # fmt: skip
    """The card of what `run_dir` trained, as the `kind` that is published."""
    sets = _hub_sets(recipe)
    return Card(
        repo=repo, kind=kind, base=base, datasets=sets, files=files, adapter=adapter, in_ollama=in_ollama,
        recipe=shown_recipe(dump(recipe), base=base.name, datasets=sets),
        facts=list(_facts(recipe, run_dir)), metrics=list(_metrics(run_dir)), limits=list(_limits(recipe, run_dir, kind)),
    )  # fmt: skip


def _hub_sets(recipe: Recipe) -> list[str]:
    """The ids of the sets of the hub that were used, those trained on first: what is on this disk is none, whatever its name."""
    sources = (recipe.data.train, recipe.data.validation, recipe.data.test)
    paths = dict.fromkeys(source.path for source in sources if isinstance(source, Source))
    return [path for path in paths if is_hub_id(path) and not Path(path).exists() and not assets.resolve(path)]


def _facts(recipe: Recipe, run_dir: Path) -> Iterator[tuple[str, str]]:
    train, lora = recipe.train, recipe.lora
    yield "method", {"lora": "LoRA", "full": "full fine-tuning", "pretrain": "pretraining"}[recipe.method]
    if recipe.method == "lora":
        targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
        kinds = "".join(f", {name}" for name, used in (("rsLoRA", lora.rslora), ("DoRA", lora.dora)) if used)
        yield "adapter", f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, targets {targets}{kinds}"
    yield (
        "base while training" if recipe.method == "lora" else "computing in",
        f"{'NF4, computing in ' if recipe.model.quantization == 'nf4' else ''}{recipe.model.dtype}",
    )
    yield from _measured(run_dir)
    yield (
        "batch",
        f"{train.global_batch_size} {'packed rows' if recipe.data.packing else 'samples'} of at most {recipe.data.sequence_length:,} tokens",
    )
    yield "optimiser", f"{train.optimizer}, learning rate {train.learning_rate:g}, {train.schedule}, weight decay {train.weight_decay:g}"
    yield "seed", str(train.seed)
    environment = read_json(run_dir / "environment.json", remedy=EXPORT_AGAIN) if (run_dir / "environment.json").is_file() else {}
    packages = environment.get("packages", {})
    found = [
        f"nemotune {environment.get('nemotune', __version__)}",
        *(f"{name} {packages[name]}" for name in VERSIONS if packages.get(name)),
    ]
    yield "versions", ", ".join(found)
    if devices := environment.get("devices"):
        yield "hardware", f"{len(devices)} x {devices[0]['name']}"


def _measured(run_dir: Path) -> Iterator[tuple[str, str]]:
    """What training came to."""
    last = next((row for row in reversed(read_metrics(run_dir)) if row["kind"] == "train"), None)
    if last:
        yield "steps", f"{last['step']:,} ({last['epoch']:.2f} epochs)"
        yield "tokens", f"{last['tokens']:,}"
        yield "last training loss", f"{last['loss']:.3f}"
    rows = _splits(run_dir).get("train", {}).get("rows")
    if rows is not None:
        yield "training rows", f"{rows:,}"


def _splits(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "data" / "stats.json"
    return read_json(path, remedy=EXPORT_AGAIN).get("splits", {}) if path.is_file() else {}


def _metrics(run_dir: Path) -> Iterator[Metric]:
    """Every metric of every task; not the groups, whose names are of the rows."""
    path = run_dir / "eval" / "compare.json"
    if not path.is_file():
        return
    for task, metrics in read_json(path, remedy=f"evaluate again with `nemotune eval {run_dir} --overwrite`")["tasks"].items():
        for name, values in metrics.items():
            shown = (number(name, values["base"]), number(name, values["tuned"]), number(name, values["difference"], signed=True))
            yield Metric(task, name, values, (*shown, interval(name, values)))


def _limits(recipe: Recipe, run_dir: Path, kind: Kind) -> Iterator[str]:
    splits = _splits(run_dir)
    rows = splits.get("train", {}).get("rows")
    told = f"its {rows:,} training rows (format `{recipe.data.format}`) show" if rows else "its training rows show"
    yield f"Outside of what {told} it may be no better than its base, or worse."
    if not (run_dir / "eval" / "compare.json").is_file():
        yield "Nobody measured it against its base."
    elif held := splits.get("test", {}).get("rows"):
        yield f"Measured on {held:,} held-out rows from the same source as the training rows, so the results say nothing of other rows."
    if recipe.data.template != "none":
        yield f"Trained with thinking {'on' if recipe.data.thinking else 'off'}: asked otherwise, it answers as nobody measured."
    if recipe.model.quantization == "nf4":
        where = "the 16-bit base" if kind != "gguf" else "GGUF's own quantisation"
        yield f"The adapter learned beside NF4 weights; on {where} its answers differ a little."
    yield "No safety evaluation was made after tuning; the base's may not hold any more."
