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
from nemotune.export.stream import in_threads
from nemotune.export.tuned import Tuned
from nemotune.models.disk_names import tensors_of
from nemotune.ops.documents import Documents

PERIOD = 1_000_003  # of the noise; a prime, so that no two rows of a matrix get the same
UNROUNDED = ("mixer.gate.weight", "mixer.conv1d.weight")  # fp32 in every file, as are vectors


def reference_logits(tuned: Tuned, prompts: Sequence[Sequence[int]], *, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """[T, V] of all positions of all prompts, which do not see one another; and the same of a model whose matrices are off by `noise` of their
    root mean square, at random: what rounding that wide would do to this model."""
    model, weights = tuned.model, _Weights(tuned, noise)
    used, tokens_T = torch.tensor([token for prompt in prompts for token in prompt]).unique(return_inverse=True)
    borders = torch.tensor([0, *map(len, prompts)]).cumsum(0).to(torch.int32)
    with torch.no_grad():  # inference_mode's tensors may not be filled by other threads
        documents = Documents(borders, tokens_T.device)
        rope = model.rope(documents.positions_T)
        exact, rounded = (table[tokens_T] for table in weights.embeddings(used.tolist()))
        for part in (*model.blocks, model.final_norm):
            args = (documents, rope, None) if part is not model.final_norm else ()
            of_part = weights.of(part)
            exact = functional_call(part, of_part, (exact, *args))
            if noise:
                weights.add_noise(of_part)
                rounded = functional_call(part, of_part, (rounded, *args))
        return weights.head(exact, rounded if noise else exact)


def reference_bytes(tuned: Tuned) -> int:
    """The most memory that weights take at once: those of the largest block, in fp32."""
    names = {module: f"{name}." for name, module in tuned.model.named_modules()}
    sizes = {name: math.prod(tensor.shape) for name, tensor in tensors_of(tuned.model).items()}
    return 4 * max(sum(size for name, size in sizes.items() if name.startswith(names[block])) for block in tuned.model.blocks)


class _Weights:
    """Base + adapter by parts of the model, in fp32 and for the caller to change; and the noise [PERIOD] that goes on top, again and again."""

    def __init__(self, tuned: Tuned, noise: float) -> None:
        self.tuned, self.state, self.on_disk = tuned, tensors_of(tuned.model), names_on_disk(tuned)
        self.names = {module: f"{name}." for name, module in tuned.model.named_modules()}
        self.noise = noise * torch.randn(PERIOD, generator=torch.Generator().manual_seed(0))

    def of(self, part: nn.Module) -> dict[str, Tensor]:
        """All weights of a part, by their names in it."""
        prefix = self.names[part]
        return {name.removeprefix(prefix): self._read(name) for name in self.state if name.startswith(prefix)}

    def add_noise(self, weights: Mapping[str, Tensor]) -> None:
        """Add noise to each matrix, in units of its root mean square."""
        in_threads(self._add_noise, [weight for name, weight in weights.items() if weight.dim() > 1 and not name.endswith(UNROUNDED)])

    def embeddings(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Those rows of the embeddings, and the same with noise."""
        name = self._matrix(self.tuned.model.embeddings)
        exact = torch.cat([self.tuned.rows(name, row, row + 1) for row in rows]).float()
        return exact, self._add_noise(exact.clone())

    def head(self, exact_TD: Tensor, rounded_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The head's outputs [T, V], those of the second input by weights with noise; some rows of it at a time."""
        model = self.tuned.model
        name = self._matrix(model.embeddings if model.config.tie_word_embeddings else model.lm_head)
        of_exact, of_rounded = (exact_TD.new_empty(len(exact_TD), model.config.vocab_size) for _ in range(2))

        def fill(rows: tuple[int, int]) -> None:
            weight_ND = self.tuned.rows(name, *rows).to(torch.float32, copy=True)
            of_exact[:, slice(*rows)] = exact_TD @ weight_ND.T
            of_rounded[:, slice(*rows)] = rounded_TD @ self._add_noise(weight_ND).T

        in_threads(fill, self.tuned.row_ranges(name))
        return of_exact, of_rounded

    def _matrix(self, part: nn.Module) -> str:
        return self.on_disk[f"{self.names[part]}weight"][0]

    def _add_noise(self, weight: Tensor) -> Tensor:
        scale = torch.linalg.vector_norm(weight).item() / math.sqrt(weight.numel())
        for values in weight.view(-1).split(PERIOD):
            values.add_(self.noise[: len(values)], alpha=scale)
        return weight

    def _read(self, name: str) -> Tensor:
        """A tensor of the model, put together from those on disk."""
        whole, on_disk = torch.empty(self.state[name].shape), self.on_disk[name]
        parts = [whole] if whole.shape == self.tuned.infos[on_disk[0]].shape else whole.unbind()
        in_threads(lambda pair: pair[0].copy_(self.tuned.read(pair[1])), zip(parts, on_disk, strict=True))
        return whole
