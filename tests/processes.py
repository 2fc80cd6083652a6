"""Several gloo processes on loopback that call one function and end by themselves; what it returns in the first of them comes back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = timedelta(seconds=120)  # after which a process that waits for another gives up


def in_processes(count: int, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in `count` processes with a process group around it; the first one's result, which torch.save can write."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "result.pt"
        mp.spawn(_work, (count, path, function, args), nprocs=count)
        return torch.load(path, weights_only=False)


def _work(rank: int, count: int, path: Path, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{path.with_name('meeting')}"  # not a port: one that is free may be taken before it is used
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=LIMIT)
    try:
        result = function(*args)
        if rank == 0:
            torch.save(result, path)
        dist.barrier()
    finally:
        dist.destroy_process_group()
