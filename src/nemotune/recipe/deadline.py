"""`train.deadline` as a point in time: `11h30m` from the start of the command, or a date and time such as `2026-05-01T18:00`.

What is made of it while training is in train/deadline.py.
"""

from __future__ import annotations

import re
from datetime import datetime

__all__ = ["stop_time"]

DURATION = re.compile(r"(?=\d)(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
MOMENT = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d.*")


def stop_time(text: str, *, started: float) -> float:
    """Seconds since 1970 of the deadline; a time without a zone is the machine's local one. Raises ValueError where `text` is none."""
    if found := DURATION.fullmatch(text):
        hours, minutes, seconds = (int(part or 0) for part in found.groups())
        if total := 3600 * hours + 60 * minutes + seconds:
            return started + total
    elif MOMENT.fullmatch(text):
        try:
            return datetime.fromisoformat(text).timestamp()
        except ValueError:
            pass
    raise ValueError(f"got {text!r}, expected hours, minutes and seconds such as '11h30m', or a date and time such as '2026-05-01T18:00'")
