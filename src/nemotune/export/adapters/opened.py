"""An adapter on disk and the base that it is for, opened by their headers: what every form is planned from. The base's weights need not be there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotune.export.megatron.checkpoint import TOKENIZER, is_megatron, iteration_of
from nemotune.export.megatron.lora import read_lora
from nemotune.export.stream import fingerprint
from nemotune.lora.adapter import CONFIG, read_adapter
from nemotune.lora.pairs import Adapter
from nemotune.models.base import CausalLM
from nemotune.models.config_json import read_config
from nemotune.models.loading import build_model
from nemotune.weights import Checkpoint


@dataclass(frozen=True)
class Opened:
    """An adapter, the directory of its tensors, and the model that it is for, on the meta device.

    `base` is what the adapter calls that model, `side_files` where tokenizer and template lie that it was trained with.
    """

    adapter: Adapter
    directory: Path
    model: CausalLM
    base_dir: Path
    base: str
    side_files: Path

    @property
    def identity(self) -> dict[str, Any]:
        """What decides every value."""
        return {"read": fingerprint(self.directory), "base": self.base, "config": self.model.config.raw}


def open_adapter(directory: Path, base_dir: Path) -> Opened:
    """The adapter in `directory`, PEFT's, vLLM's or a LoRA checkpoint of Megatron-Bridge, checked against the config.json of its base.

    Raises CheckpointError, MissingFileError, UnsupportedError.
    """
    model = build_model(read_config(base_dir))
    if any(base_dir.glob("*.safetensors")):
        model.source = Checkpoint(base_dir)
    if is_megatron(directory):
        iteration = iteration_of(directory)
        return Opened(read_lora(iteration, model), iteration, model, base_dir, str(base_dir), iteration / TOKENIZER)
    adapter = read_adapter(directory, model)
    base = json.loads((directory / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    return Opened(adapter, directory, model, base_dir, base or str(base_dir), directory)
