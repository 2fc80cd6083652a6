"""What a block keeps for the backward, counted."""

from __future__ import annotations

import torch


def kept_for_backward(block, x, documents, rope=None) -> int:
    """Bytes of distinct memory that one forward keeps; parameters, buffers and `rope` apart."""
    held = [*block.parameters(), *block.buffers(), *(rope or ())]
    apart = {t.untyped_storage().data_ptr() for t in held}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, documents, rope)
    return sum(size for size, _ in kept.values())
