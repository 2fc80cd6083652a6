"""Native generation: `generate` turns prompts into new tokens on whatever weights the model holds, adapters included.

Batching is in batch.py, the choice of one token in sampling.py. It is not a server: `serve/` launches vLLM for that.
"""

from __future__ import annotations

from nemotune.generate.batch import generate, inference
from nemotune.generate.sampling import Sampling

__all__ = ["Sampling", "generate", "inference"]
