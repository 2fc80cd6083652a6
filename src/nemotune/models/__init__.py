"""The two model families as plain single-device PyTorch, and their way from and to Hugging Face directories.

Start with `nemotron_h.py`. No `torch.distributed` here, no training, no adapters.
"""

from nemotune.models.base import CausalLM
from nemotune.models.cache import Cache
from nemotune.models.config import LlamaConfig, NemotronHConfig
from nemotune.models.config_json import parse_config, read_config
from nemotune.models.loading import build_model, load_model
from nemotune.models.locate import load_tokenizer, locate
from nemotune.models.saving import save_model

__all__ = [
    "Cache", "CausalLM", "LlamaConfig", "NemotronHConfig", "build_model", "load_model", "load_tokenizer", "locate",
    "parse_config", "read_config", "save_model",
]  # fmt: skip
