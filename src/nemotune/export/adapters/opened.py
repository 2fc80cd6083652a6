"""An adapter on disk and the base that it is for, opened by their headers: what every form is planned from. The base's weights need not be there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotune.export.stream import fingerprint
from nemotune.lora.adapter import CONFIG, read_adapter
from nemotune.lora.pairs import Adapter
from nemotune.models.base import CausalLM
from nemotune.models.config_json import read_config
from nemotune.models.loading import build_model
from nemotune.weights import Checkpoint


@dataclass(frozen=True)
class Opened:
    """An adapter, its directory, and the model that it is for, on the meta device; `base` is what the adapter calls that model."""

    adapter: Adapter
    directory: Path
    model: CausalLM
    base: str

    @property
    def identity(self) -> dict[str, Any]:
        """What decides every value."""
        return {"read": fingerprint(self.directory), "base": self.base, "config": self.model.config.raw}


def open_adapter(directory: Path, base_dir: Path) -> Opened:
    """The adapter in `directory`, checked against the config.json of its base. Raises CheckpointError, MissingFileError, UnsupportedError."""
    model = build_model(read_config(base_dir))
    if any(base_dir.glob("*.safetensors")):
        model.source = Checkpoint(base_dir)
    adapter = read_adapter(directory, model)
    base = json.loads((directory / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    return Opened(adapter, directory, model, base or str(base_dir))
