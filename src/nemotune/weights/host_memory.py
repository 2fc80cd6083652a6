"""What the host can still hold, so that a copy of weights is made only where there is room for it."""

from __future__ import annotations

import math
from pathlib import Path


def free_host_memory() -> float:
    """Bytes of the host's memory that this process may still take, as the system and its container tell; infinite where neither does."""
    found = [math.inf]
    if (system := Path("/proc/meminfo")).is_file():
        found.append(int(system.read_text().split("MemAvailable:")[1].split()[0]) * 1024)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (most := limit.read_text().strip()).isdigit():
        found.append(int(most) - int(used.read_text()))
    return min(found)
