"""Processes that torchrun starts again meet in its store, which still holds the addresses of those that are gone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from nemotune.distributed.world import _fresh


def test_every_attempt_meets_apart_from_those_before_whoever_of_them_was_lost() -> None:
    store = dist.HashStore()
    store.set("asks/2", "gone")  # rank 2 of an attempt of which rank 0 never came

    def attempt(word: str) -> None:
        def rank(number: int) -> list[str]:
            mine = _fresh(store, number, 3)
            assert not any(mine.check([f"address/{other}"]) and word not in mine.get(f"address/{other}").decode() for other in range(3))
            mine.set(f"address/{number}", f"{word} {number}")
            return [mine.get(f"address/{other}").decode() for other in range(3)]

        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(rank, range(3))) == [[f"{word} {number}" for number in range(3)]] * 3

    attempt("first")
    attempt("second")
