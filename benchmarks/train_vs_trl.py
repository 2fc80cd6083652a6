"""LoRA on 300 Glaive rows: nemotune against TRL + PEFT + transformers, each at its own settings, on the same documents.

    python -m benchmarks.train_vs_trl --data NEMOTUNE_TEST_DATA [--family llama] [--rounds 2]

Both get the same tokens and the same supervised positions, the same LoRA targets, AdamW and learning rate, about 4,096 tokens a step;
documents of at most 1,024 tokens, whole. nemotune packs them; TRL pads them (its own collator), one or four to a batch, also grouped by
length. Useful tokens are those of documents, not padding; the first step of each run is not counted. Needs `pip install trl`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.harness import RESULTS, in_turn, save, table
from benchmarks.models import CONFIGS, write_model
from nemotune.data.prepare import Prepared, prepare
from nemotune.models import load_tokenizer
from nemotune.recipe import Recipe, load

LONGEST, TOKENS_PER_STEP = 1024, 4096
TARGETS = {
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "shared_experts.up_proj", "shared_experts.down_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
NATIVE = {
    "nemotune, bf16": [],
    "nemotune, bf16, selective checkpointing": ["train.activation_checkpointing=selective"],
    "nemotune, bf16, full checkpointing": ["train.activation_checkpointing=full"],
    "nemotune, fp32": ["model.dtype=float32"],
}
TRL = {
    "TRL, bf16, batch 1": {"dtype": "bfloat16", "batch": 1},
    "TRL, bf16, batch 4": {"dtype": "bfloat16", "batch": 4},
    "TRL, bf16, batch 4, grouped by length": {"dtype": "bfloat16", "batch": 4, "grouped": True},
    "TRL, fp32, batch 1": {"dtype": "float32", "batch": 1},
}


def main() -> None:
    asked = _arguments()
    recipe, prepared = make_setting(asked.family, asked.data)
    model, documents = recipe.with_name("model"), recipe.with_name("documents.json")
    rows = [prepared.train[index] for index in range(len(prepared.train))]
    documents.write_text(json.dumps([{"input_ids": d.tokens.tolist(), "mask": d.mask.tolist()} for d in rows]))
    per_step = round(TOKENS_PER_STEP / (sum(len(d.tokens) for d in rows) / len(rows)) / 4) * 4
    commands = {
        name: [sys.executable, "-m", "benchmarks.train_native", str(recipe), str(asked.steps), *overrides]
        for name, overrides in NATIVE.items()
    }
    for name, settings in TRL.items():
        given = settings | {"documents_per_step": per_step, "targets": TARGETS[asked.family], "steps": asked.trl_steps}
        commands[name] = [sys.executable, "-m", "benchmarks.train_trl", str(model), str(documents), json.dumps(given)]
    figures = in_turn(commands, rounds=asked.rounds)
    counts = {"rounds": asked.rounds, "steps": asked.steps, "trl_steps": asked.trl_steps}
    found = {"figures": figures, "counts": counts, "table": show(figures), "told": told(figures, **counts)}
    path = save("train_vs_trl", found, packages=("torch", "transformers", "peft", "trl", "accelerate"))
    path = path.replace(RESULTS / f"train_vs_trl_{asked.family}.json")
    print(found["table"], found["told"], sep="\n\n")
    print(f"wrote {path}", file=sys.stderr)


def make_setting(family: str, data: Path) -> tuple[Path, Prepared]:
    """The recipe of `family`, written beside its random model, and its prepared rows, under runs/benchmarks. `data` as in the arguments."""
    work = Path("runs") / "benchmarks" / family
    work.mkdir(parents=True, exist_ok=True)
    model, rows, recipe = work / "model", work / "rows.jsonl", work / "recipe.json"
    if not model.is_dir():
        write_model(family, model, nemotron=data / "data" / "nemotron")
    _write_short_rows(data / "data" / "glaive" / "raw_format_reconstructed_300.jsonl", rows, work, model)
    recipe.write_text(json.dumps(_recipe(model, rows, length=TOKENS_PER_STEP, family=family)))
    return recipe, _prepare(load(str(recipe)), work / "data")


def told(figures: dict[str, dict[str, float]], *, rounds: int, steps: int, trl_steps: int) -> str:
    """What the table comes to in words, by one row of ours: plain bf16."""
    ours, best, four = figures["nemotune, bf16"], _best(figures), figures["TRL, bf16, batch 4"]
    speed, to_four = (ours["tokens_per_second"] / theirs["tokens_per_second"] for theirs in (best, four))
    return (
        f"In plain bf16 nemotune runs {speed:.2f} times as many useful tokens a second as TRL's fastest setting, in {ours['peak_gb'] / best['peak_gb']:.2f} times "
        f"its memory, and {to_four:.2f} times as many as TRL's batch of 4, in {ours['peak_gb'] / four['peak_gb']:.2f} times its memory. "
        f"Rounds: {rounds}. Steps of nemotune: {steps}, of TRL: {trl_steps}, of which each one's first is not counted."
    )


def _best(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """TRL's fastest setting."""
    return max((found for name, found in figures.items() if name.startswith("TRL")), key=lambda found: found["tokens_per_second"])


def _speed(found: dict[str, float]) -> str:
    """The median of the rounds; of several, from the slowest to the fastest as well."""
    if "tokens_per_second_low" not in found:
        return f"{found['tokens_per_second']:.0f}"
    return f"{found['tokens_per_second']:.0f} ({found['tokens_per_second_low']:.0f} to {found['tokens_per_second_high']:.0f})"


def show(figures: dict[str, dict[str, float]]) -> str:
    """The figures beside those of TRL's fastest setting."""
    best = _best(figures)
    rows = [
        (
            name, _speed(found), f"{found['tokens_per_second'] / best['tokens_per_second']:.2f}", f"{found['peak_gb']:.2f}",
            f"{found['peak_gb'] / best['peak_gb']:.2f}", f"{found['padding']:.0%}", f"{found['first_loss']:.3f} to {found['last_loss']:.3f}",
        )
        for name, found in figures.items()
    ]  # fmt: skip
    return table(("", "useful tokens/s", "to TRL's best", "peak GB", "to TRL's best", "padding", "loss, first to last step"), rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory that holds data/glaive and data/nemotron")
    parser.add_argument("--family", choices=CONFIGS, default="nemotron_h")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="steps of nemotune, the first not counted")
    parser.add_argument("--trl-steps", type=int, default=3, help="steps of TRL, the first not counted")
    return parser.parse_args()


def _recipe(model: Path, rows: Path, *, length: int, family: str) -> dict:
    return {
        "name": f"benchmark-{family}", "model": {"path": str(model)}, "method": "lora",
        "data": {"format": "glaive", "train": str(rows), "sequence_length": length, "validation": None, "test": None},
        "lora": {"rank": 16, "alpha": 32, "targets": TARGETS[family]},
        "train": {"global_batch_size": 1, "learning_rate": 1e-3, "warmup_steps": 1, "schedule": "constant", "activation_checkpointing": "none"},
        "logging": {"every": 1, "trackers": []}, "evaluate": {"tasks": []},
    }  # fmt: skip


def _prepare(recipe: Recipe, directory: Path) -> Prepared:
    return prepare(recipe, load_tokenizer(recipe.model.path), out_dir=directory, overwrite=True)


def _write_short_rows(source: Path, target: Path, work: Path, model: Path) -> None:
    """The rows whose documents all fit into LONGEST tokens."""
    recipe = work / "short.json"
    recipe.write_text(json.dumps(_recipe(model, source, length=LONGEST, family="llama")))
    _prepare(load(str(recipe)), work / "short")
    kept = {json.loads(line)["meta"]["row"] for line in (work / "short" / "train.jsonl").read_text().splitlines()}
    lines = source.read_text(encoding="utf-8").splitlines()
    target.write_text("".join(lines[row] + "\n" for row in sorted(kept)), encoding="utf-8")


if __name__ == "__main__":
    main()
