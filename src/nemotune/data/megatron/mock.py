"""`MockDataset`: random documents without files, to try a pretraining before its data are there. The same for a seed on any machine."""

from __future__ import annotations

import numpy as np

PAGE = 4096  # tokens; no document crosses a page
PAGES = 1 << 14  # 67 million tokens, then it begins again


class MockDataset:
    """Stands in for an IndexedDataset: documents of 1 to 4,096 tokens, low token ids more frequent, each document's last token `end`."""

    dtype = np.dtype("<i4")
    num_tokens = PAGE * PAGES

    def __init__(self, *, seed: int, vocab_size: int, end: int) -> None:
        self.prefix = "mock"
        self._seed, self._vocab_size, self._end = seed, vocab_size, end

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens `start` to `end`."""
        first = start // PAGE
        pages = [self._page(number) for number in range(first, -(-end // PAGE))]
        return np.concatenate(pages)[start - first * PAGE : end - first * PAGE]

    def starts(self, start: int, end: int) -> np.ndarray:
        """Where documents begin from token `start` on and before `end`."""
        first = start // PAGE
        found = np.concatenate([number * PAGE + self._cuts(number) for number in range(first, -(-end // PAGE))])
        return found[(found >= start) & (found < end)]

    def count(self, start: int, end: int) -> int:
        """About how many documents begin from token `start` on and before `end`: as if on each page as on the first."""
        return (end - start) * len(self._cuts(0)) // PAGE

    def border(self, token: int) -> int:
        """Where the first document from `token` on begins."""
        return min(-(-token // PAGE) * PAGE, self.num_tokens)

    def digest(self) -> str:
        """What decides about its tokens."""
        return f"mock {self._seed} {self._vocab_size} {self._end}"

    def _cuts(self, number: int) -> np.ndarray:
        random = np.random.RandomState([self._seed, number, 0])
        return np.unique(np.append(random.randint(0, PAGE, random.randint(1, 12)), 0))

    def _page(self, number: int) -> np.ndarray:
        tokens = (self._vocab_size * np.random.RandomState([self._seed, number, 1]).random_sample(PAGE) ** 3).astype(self.dtype)
        tokens[self._cuts(number) - 1] = self._end  # -1, before the first document, is the page's last token
        return tokens
