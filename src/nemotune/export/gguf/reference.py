"""The logits of base + adapter in fp32 with the weights of one block in memory at a time: what a GGUF file is compared with.

It is the model's own forward, each part called with weights that are read for it and let go after it. Slow for anything but one row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nemotune.export.gguf.names import names_on_disk
from nemotune.export.tuned import Tuned
from nemotune.models.disk_names import tensors_of
from nemotune.ops.documents import Documents

PERIOD = 1_000_003  # of the noise; a prime, so that no two rows of a matrix get the same
UNROUNDED = ("mixer.gate.weight", "mixer.conv1d.weight")  # fp32 in every file, as are vectors


def reference_logits(tuned: Tuned, prompts: Sequence[Sequence[int]], *, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """[T, V] of all positions of all prompts, which do not see one another; and the same of a model whose matrices are off by `noise` of their
    root mean square, at random: what rounding that wide would do to this model."""
    model, weights = tuned.model, _Weights(tuned)
    tokens_T = torch.tensor([token for prompt in prompts for token in prompt])
    borders = torch.tensor([0, *map(len, prompts)]).cumsum(0).to(torch.int32)
    noises = noise * torch.randn(PERIOD, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        documents = Documents(borders, tokens_T.device)
        rope = model.rope(documents.positions_T)
        exact, rounded = tokens_T, tokens_T
        for part in (model.embeddings, *model.blocks, model.final_norm, model.lm_head):
            args = (documents, rope, None) if part in set(model.blocks) else ()
            of_part = weights.of(model.embeddings if part is model.lm_head and model.config.tie_word_embeddings else part)
            exact = functional_call(part, of_part, (exact, *args))
            if noise:
                _add_noise(of_part, noises)
                rounded = functional_call(part, of_part, (rounded, *args))
    return exact.float(), (rounded if noise else exact).float()


def _add_noise(weights: Mapping[str, Tensor], noise: Tensor) -> None:
    """Add `noise` [PERIOD], again and again, to each matrix, in units of its root mean square."""
    for name, weight in weights.items():
        if weight.dim() > 1 and not name.endswith(UNROUNDED):
            scale = weight.square().mean().sqrt().item()
            for values in weight.view(-1).split(PERIOD):
                values.add_(noise[: len(values)], alpha=scale)


def reference_bytes(tuned: Tuned) -> int:
    """The most memory that its weights take: those of the largest part in fp32, and the tensors that they are put together from."""
    model, sizes = tuned.model, {name: math.prod(tensor.shape) for name, tensor in tensors_of(tuned.model).items()}
    names = {module: f"{name}." for name, module in model.named_modules()}
    parts = [model.embeddings, model.lm_head, *model.blocks]
    return 8 * max(sum(size for name, size in sizes.items() if name.startswith(names[part])) for part in parts)


class _Weights:
    """Base + adapter by parts of the model, in fp32 and for the caller to change."""

    def __init__(self, tuned: Tuned) -> None:
        self.tuned, self.state, self.on_disk = tuned, tensors_of(tuned.model), names_on_disk(tuned)
        self.names = {module: f"{name}." for name, module in tuned.model.named_modules()}

    def of(self, part: nn.Module) -> dict[str, Tensor]:
        prefix = self.names[part]
        return {name.removeprefix(prefix): self._read(name) for name in self.state if name.startswith(prefix)}

    def _read(self, name: str) -> Tensor:
        read = [self.tuned.read(disk_name).to(torch.float32, copy=True) for disk_name in self.on_disk[name]]
        return torch.stack(read) if len(self.state[name].shape) > read[0].dim() else read[0]
