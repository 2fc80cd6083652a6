"""Model directories to export: random models of `random_models.py` in bf16, with nemotron-tiny's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from random_models import make

from nemotune import assets

TINY = assets.resolve("nemotron-tiny")
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def saved(directory: Path, variant: str, **config: Any) -> Path:
    """The variant with `config` changed, as transformers saves it, in `directory`."""
    pattern = config.get("hybrid_override_pattern")
    model = make(variant, **{"vocab_size": 1504, "eos_token_id": 2} | ({"num_hidden_layers": len(pattern)} if pattern else {}) | config)
    model.to(torch.bfloat16).save_pretrained(directory)
    for name in SIDE_FILES:
        shutil.copy(TINY / name, directory / name)
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
