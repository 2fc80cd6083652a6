"""The logits of base + adapter in fp32 with the weights of one block in memory at a time: what a GGUF file is compared with.

It is the model's own forward, each part called with weights that are read for it and let go after it. Slow for anything but one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nemotune.export.gguf.names import names_on_disk
from nemotune.export.tuned import Tuned
from nemotune.models.disk_names import tensors_of
from nemotune.ops.documents import Documents


def reference_logits(tuned: Tuned, prompts: Sequence[Sequence[int]]) -> Tensor:
    """[T, V] of all positions of all prompts, which do not see one another."""
    model, weights = tuned.model, _Weights(tuned)
    tokens_T = torch.tensor([token for prompt in prompts for token in prompt])
    borders = torch.tensor([0, *map(len, prompts)]).cumsum(0).to(torch.int32)
    with torch.inference_mode():
        documents = Documents(borders, tokens_T.device)
        rope = model.rope(documents.positions_T)
        x_TD = weights.call(model.embeddings, tokens_T)
        for block in model.blocks:
            x_TD = weights.call(block, x_TD, documents, rope, None)
        x_TD = weights.call(model.final_norm, x_TD)
        head = functional_call(model.lm_head, weights.of(model.embeddings if model.config.tie_word_embeddings else model.lm_head), (x_TD,))
    return head.float()


def reference_bytes(tuned: Tuned) -> int:
    """The most memory that its weights take: those of the largest part in fp32, and the tensors that they are being put together from."""
    model, sizes = tuned.model, {name: math.prod(tensor.shape) for name, tensor in tensors_of(tuned.model).items()}
    names = {module: f"{name}." for name, module in model.named_modules()}
    parts = [model.embeddings, model.lm_head, *model.blocks]
    return 8 * max(sum(size for name, size in sizes.items() if name.startswith(names[part])) for part in parts)


class _Weights:
    """Base + adapter by parts of the model."""

    def __init__(self, tuned: Tuned) -> None:
        self.tuned, self.state, self.on_disk = tuned, tensors_of(tuned.model), names_on_disk(tuned)
        self.names = {module: f"{name}." for name, module in tuned.model.named_modules()}

    def call(self, part: nn.Module, *args: object) -> Tensor:
        """`part(*args)` with its weights."""
        return functional_call(part, self.of(part), args)

    def of(self, part: nn.Module) -> dict[str, Tensor]:
        prefix = self.names[part]
        return {name.removeprefix(prefix): self._read(name) for name in self.state if name.startswith(prefix)}

    def _read(self, name: str) -> Tensor:
        read = [self.tuned.read(disk_name).float() for disk_name in self.on_disk[name]]
        return torch.stack(read) if len(self.state[name].shape) > read[0].dim() else read[0]
