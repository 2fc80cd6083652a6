"""What the two families share: the walk over the blocks of a packed row, the head, and a cache to generate with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nemotune.models.cache import Cache, KVState, MambaState
from nemotune.models.config import LlamaConfig, NemotronHConfig
from nemotune.models.layers import Linear
from nemotune.ops.cross_entropy import SoftmaxLoss, linear_cross_entropy, softmax_loss
from nemotune.ops.documents import Documents
from nemotune.weights import Checkpoint, Layout, Stack

# Logits computed at once, in a buffer of fp32: 134 MB on CUDA, 67 MB on the CPU (a tenth faster there than 34; 134 gain a twentieth more).
LOGITS_PER_CHUNK = {True: 2**25, False: 2**24}


def run_plainly(block: nn.Module, *args: Any) -> Tensor:
    """Call the block. Activation checkpointing puts another function in its place."""
    return block(*args)


class Head(Linear):
    """The output layer. It is told which tokens of the row it sees, all if nothing is said: an adapter's dropout depends on that."""

    def forward(self, x_ND: Tensor, rows_N: Tensor | None = None) -> Tensor:
        return super().forward(x_ND)


class CausalLM(nn.Module, ABC):
    """A decoder over packed rows. Subclasses name their parts; see `nemotron_h.py` and `llama.py`."""

    family: ClassVar[str]
    linear_blocks: ClassVar[Mapping[str, str]]  # block type -> pattern that ends the names of its linear modules
    stacks: ClassVar[tuple[Stack, ...]] = ()
    fp32_parameters: ClassVar[tuple[str, ...]] = ()  # last parts of names that stay fp32 whatever the dtype
    aliases: ClassVar[Mapping[str, str]] = {}  # prefixes that other tools write -> the checkpoint's own
    config: NemotronHConfig | LlamaConfig
    lm_head: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.compute_dtype = torch.float32
        self.run_block: Callable[..., Tensor] = run_plainly
        self.softmax_loss: SoftmaxLoss = softmax_loss
        self.source: Checkpoint | None = None  # where the weights came from: names, dtypes and unused tensors are written back from it
        self.layouts: dict[str, Layout] = {}  # of the tensors that this process holds in part
        self.directory: Path | None = None  # config, tokenizer and template beside the weights

    @property
    @abstractmethod
    def embeddings(self) -> nn.Module: ...

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList: ...

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module: ...

    @abstractmethod
    def new_layer_state(self, index: int, batch_size: int, max_length: int) -> KVState | MambaState | None: ...

    def rope(self, positions_T: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the positions, for families that rotate queries and keys; computed once for all layers."""
        return None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self, tokens_T: Tensor, documents: Documents | Tensor, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Hidden states [T, D] after the final norm, in the compute dtype.

        `tokens_T` holds `documents` end to end, given as such or by their borders `cu_seqlens` [docs + 1], best on the CPU: nothing waits
        for a device then. Nothing passes from one document to another.
        `positions` [T] default to each token's place in its document. With a `cache`, the first call takes one prompt per
        sequence, every later one a single token per sequence.
        """
        if isinstance(documents, Tensor):
            documents = Documents(documents, tokens_T.device)
        if positions is None:
            positions = cache.positions_T(documents) if cache else documents.positions_T
        rope = self.rope(positions)
        x_TD = self.embeddings(tokens_T).to(self.compute_dtype)
        for index, block in enumerate(self.blocks):
            x_TD = self.run_block(block, x_TD, documents, rope, cache.layers[index] if cache else None)
        if cache:
            cache.advance(documents)
        return self.final_norm(x_TD)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The head's output [N, V], fp32."""
        return self.lm_head(hidden_ND).float()

    def loss(self, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        """The sum of -log p(target) over the positions that have one (not -100), fp32; only they reach the head.

        `targets_T` best lies on the CPU: nothing waits for a device then.
        """
        chunk_tokens = max(1, LOGITS_PER_CHUNK[hidden_TD.device.type == "cuda"] // self.config.vocab_size)
        return linear_cross_entropy(self.lm_head, hidden_TD, targets_T, chunk_tokens=chunk_tokens, loss=self.softmax_loss)

    def row_loss(self, tokens_T: Tensor, documents: Documents, targets_T: Tensor) -> Tensor:
        """`loss` of a row from its tokens, in one call."""
        return self.loss(self(tokens_T, documents), targets_T)

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for `batch_size` sequences of at most `max_length` tokens, prompts and answers together."""
        states = [self.new_layer_state(i, batch_size, max_length) for i in range(len(self.blocks))]
        return Cache(states, torch.zeros(batch_size, dtype=torch.long, device=self.device))

    def tie_head(self) -> None:
        """Make head and embeddings one parameter."""
        self.lm_head.weight = self.embeddings.weight

    def layout(self, name: str, tensor: Tensor) -> Layout:
        """Which part of the whole tensor `name` this process holds as `tensor`."""
        return self.layouts.get(name) or Layout.whole(tensor.shape)

    def stays_fp32(self, name: str) -> bool:
        """Whether parameter `name` is held in fp32 whatever the model's dtype."""
        return name.rsplit(".", 1)[-1] in self.fp32_parameters
