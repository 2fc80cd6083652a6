"""A whole run directory without training: real prepared rows, real evaluations of toy models, a made-up loss curve."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from rich.console import Console
from toy_model import Parrot

from nemotune.data.prepare import Prepared, prepare
from nemotune.data.template import Renderer
from nemotune.evaluate import compare_files, run
from nemotune.files import write_json
from nemotune.lora.targets import Coverage, CoverageRow
from nemotune.models import load_tokenizer
from nemotune.plan import environment
from nemotune.recipe import dump, load
from nemotune.train.checkpoint import Checkpoints, Progress
from nemotune.train.metrics import Metrics

# Of a run that takes seconds.
SETTINGS = (
    "data.max_samples=12", "data.test=0.2", "data.validation=null", "data.sequence_length=512", "train.eval_every=null", "train.max_steps=2",
    "train.micro_batch_size=1", "train.global_batch_size=1", "logging.trackers=[]", "evaluate.tasks=[perplexity]", "evaluate.max_samples=2",
)  # fmt: skip

TINY = Path(__file__).parents[1] / "src" / "nemotune" / "assets" / "nemotron-tiny"
CITIES = ["Oslo", "Rome", "Lima", "Cairo", "Paris", "Quito", "Delhi", "Tokyo", "Accra", "Perth", "Turin", "Minsk"]
TOOL = {"name": "get_weather", "description": "The weather of some days", "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}  # fmt: skip


def chat_rows(count: int) -> list[dict]:
    """Requests for the weather of a city, each answered with a call; every sixth answered in words."""
    rows = []
    for number in range(count):
        city, days = CITIES[number % len(CITIES)], 1 + number % 7
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": city, "days": days}}}],
        }
        words = {"role": "assistant", "content": f"I know no city near {city}."}
        asked = f"<b>Request {number}</b>: the weather in {city} for {days} days?"
        rows.append({"messages": [{"role": "user", "content": asked}, words if number % 6 == 5 else call], "tools": [TOOL]})
    return rows


def make_run(tmp_path: Path, *, overrides: tuple[str, ...] = ()) -> Path:
    """runs/toy with data, metrics, evaluations of a base that knows a few answers and a tuned one that knows most, coverage, environment."""
    run_dir, rows = tmp_path / "toy", tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [*chat_rows(60), {"messages": "none"}]))
    settings = ("data.validation=0.1", "data.test=0.4", f"data.train.path={rows}", f"model.path={TINY}", "train.eval_every=20", *overrides)
    recipe = load("quickstart", settings)
    tokenizer = load_tokenizer(TINY)
    prepared = prepare(recipe, tokenizer, out_dir=run_dir / "data", cache_dir=tmp_path / "cache")
    write_json(run_dir / "recipe.json", {"recipe": dump(recipe), "data_fingerprint": prepared.fingerprint, "code_revision": "6e311a4"})
    write_json(run_dir / "environment.json", environment.describe())
    write_json(
        run_dir / "coverage.json",
        Coverage((CoverageRow("attention", 2, 8, 8, 65536, 262144), CoverageRow("mamba", 4, 8, 4, 40960, 163840)), 1_400_000).to_json(),
    )
    _write_metrics(run_dir, steps=120)
    for label, known in (("base", 0.2), ("tuned", 0.9)):
        run(_knows(prepared, tokenizer, recipe, known), tokenizer, recipe, prepared, label=label, out_dir=run_dir / "eval")
    compare_files(run_dir / "eval")
    return run_dir


def _knows(prepared: Prepared, tokenizer, recipe, share: float) -> Parrot:
    """A model that knows the first `share` of the test rows by heart."""
    renderer = Renderer(tokenizer, template=recipe.data.template)
    documents = [prepared.test[index].tokens.tolist() for index in range(int(share * len(prepared.test)))]
    return Parrot(documents, vocab_size=len(tokenizer), eos_token_id=tuple(renderer.stop_ids), lost=tokenizer.eos_token_id)


def _write_metrics(run_dir: Path, *, steps: int) -> None:
    metrics = Metrics(run_dir, ())
    for step in range(1, steps + 1):
        loss = 0.3 + 4.0 * math.exp(-step / 18) + 0.08 * math.sin(step * 1.7)
        metrics.write(
            "train", step, epoch=step / 60, loss=loss, learning_rate=2e-3 * (1 - step / steps), grad_norm=1 + loss / 4, tokens=3000 * step,
            supervised_tokens=400, tokens_per_second=8000 + 300 * math.cos(step), seconds=0.4, peak_memory_bytes=900_000_000,
        )  # fmt: skip
        if step % 20 == 0:
            metrics.write("eval", step, loss=loss + 0.15, perplexity=math.exp(loss + 0.15))
    metrics.write("warning", 31, message="loss 2.10 is far above its recent mean 0.90")
    metrics.close()


def leave_checkpoint(run_dir):
    """A checkpoint that a resume finds, of a layer that nobody has."""
    layer = torch.nn.Linear(1, 1)
    with Checkpoints(run_dir, keep=1) as checkpoints:
        checkpoints.save(layer, torch.optim.SGD(layer.parameters()), Progress(step=2))


def options(run_dir, **changed):
    return {"run_dir": run_dir, "overwrite": False, "dry_run": False, "console": Console(quiet=True), **changed}
