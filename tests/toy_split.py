"""A prepared split without files: what the training tests feed the loop."""

from __future__ import annotations

import numpy as np

from nemotune.data.split import Document


class ToySplit:
    """Documents of random tokens, the second half of each supervised; `packs` lists the documents of each row."""

    in_order = False

    def __init__(self, lengths, *, vocab_size=96, seed=0, packs=None):
        random = np.random.RandomState(seed)
        self.documents = [
            Document(random.randint(0, vocab_size, length).astype(np.int32), np.arange(length) >= length // 2, row)
            for row, length in enumerate(lengths)
        ]
        self.packs = [np.array(pack) for pack in packs] if packs else [np.array([i]) for i in range(len(lengths))]

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.documents[index]
