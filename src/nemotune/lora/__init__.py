"""LoRA (arXiv 2106.09685) on linear layers, experts and embeddings: which modules, how they compute, and the adapter on disk.

Single device; training is elsewhere. Start with `layers.py`, then `targets.py`.
"""

from nemotune.lora.adapter import load_adapter, save_adapter
from nemotune.lora.dropout import DropoutKeys
from nemotune.lora.layers import LoRAEmbedding, LoRAExperts, LoRALinear, lora_modules
from nemotune.lora.targets import Coverage, apply_lora, coverage

__all__ = [
    "Coverage", "DropoutKeys", "LoRAEmbedding", "LoRAExperts", "LoRALinear",
    "apply_lora", "coverage", "load_adapter", "lora_modules", "save_adapter",
]  # fmt: skip
