"""Make nemotron-tiny and the quickstart's rows anew: `python -m scripts.make_tiny`, from the root of the repository.

Tokenizer, rows and texts come from seeds; the weights from a drill in copying (model.py), nemotune's own pretraining on
text (pretrain.yaml) and its full fine-tuning on conversations (instruct.yaml), together about forty minutes on one core. The result replaces src/nemotune/assets/nemotron-tiny; the chat template there is
written by hand and stays. What lies between is left under runs/.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from rich.console import Console

from nemotune.recipe import load
from nemotune.workflow import stages
from scripts.make_tiny import calls, chats, corpus, model, tokenizer, words
from scripts.make_tiny.rendering import MODEL_DIR, render

HERE = Path(__file__).parent
WORK = Path("runs/make-tiny")
NUM_PAGES, NUM_CONVERSATIONS = 24_000, 80_000


def main() -> None:
    """Everything, in order."""
    WORK.mkdir(parents=True, exist_ok=True)
    trained = tokenizer.train(_tokenizer_texts())
    tokenizer.save(trained, MODEL_DIR)
    model.write_configs(MODEL_DIR)
    write_rows(MODEL_DIR)
    _write_lines(WORK / "pages.jsonl", ({"text": text} for text in islice(corpus.pages(random.Random(4)), NUM_PAGES)))
    model.write_start(WORK / "start", like=MODEL_DIR, seed=0)
    _write_lines(WORK / "conversations.jsonl", islice(chats.rows(random.Random(5)), NUM_CONVERSATIONS))
    _train(HERE / "pretrain.yaml")
    weights = _train(HERE / "instruct.yaml") / "model.safetensors"
    shutil.copyfile(weights, MODEL_DIR / "model.safetensors")
    print(f"wrote {MODEL_DIR}: {weights.stat().st_size / 1e6:.1f} MB of weights")


def write_rows(directory: Path) -> None:
    """Write the quickstart's rows: train.jsonl, and under test/ those with held-out arguments and those with held-out tools."""
    (directory / "test").mkdir(exist_ok=True)
    _write_lines(directory / "train.jsonl", calls.training_rows(random.Random(11), 2000))
    _write_lines(directory / "test" / "arguments.jsonl", calls.test_rows(random.Random(12), 150))
    _write_lines(directory / "test" / "tools.jsonl", calls.new_tool_rows(random.Random(13), 150))


def _tokenizer_texts() -> Iterable[str]:
    yield from islice(corpus.documents(random.Random(1)), 20_000)
    for row in calls.training_rows(random.Random(2), 1_500):
        yield render(row["messages"], row["tools"])
    names = words.PEOPLE + words.PLACES + words.SIZES + words.COLOURS  # each of them one token, at the start of a line and after a space
    yield from ["\n".join(names), " ".join(names)] * 300


def _train(path: Path) -> Path:
    """Carry out a training recipe; returns the model's directory."""
    recipe = load(str(path))
    stages.train(recipe, run_dir=recipe.run_dir, resume=False, overwrite=True, dry_run=False, console=Console(stderr=True))
    return recipe.run_dir / "model"


def _write_lines(path: Path, rows: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)


if __name__ == "__main__":
    main()
