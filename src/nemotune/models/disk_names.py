"""Which tensors on disk a model's own are made of: one each, or a row of a stack each. No tensor is read or written here."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from nemotune.models.base import CausalLM
from nemotune.weights.mapping import Piece, pieces_of

HEAD = "lm_head.weight"


def disk_pieces(model: CausalLM) -> Iterator[tuple[str, tuple[str, int | None]]]:
    """(name on disk, (parameter, index along dim 0 or None for the whole)) for every tensor that the model holds."""
    for name, tensor in tensors_of(model).items():
        for piece in pieces_of(name, tensor.shape, model.stacks):
            yield name_on_disk(piece, model), (name, piece.index)
    if has_copied_head(model):
        yield HEAD, (embeddings_name(model), None)


def tensors_of(model: CausalLM) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tied head is not a tensor of its own. Adapters are not part of the base."""
    tied = {HEAD} if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def name_on_disk(piece: Piece, model: CausalLM) -> str:
    """The name that the source uses for `piece`: its own, or one with a prefix that other tools write."""
    if model.source is not None and piece.name not in model.source:
        for alias, prefix in model.aliases.items():
            if piece.name.startswith(prefix) and (renamed := alias + piece.name.removeprefix(prefix)) in model.source:
                return renamed
    return piece.name


def has_copied_head(model: CausalLM) -> bool:
    """Whether the source stores a head although it is tied to the embeddings."""
    return model.config.tie_word_embeddings and model.source is not None and HEAD in model.source


def embeddings_name(model: CausalLM) -> str:
    """The parameter that a copied head is a copy of."""
    return next(name for name, parameter in model.named_parameters() if parameter is model.embeddings.weight)
