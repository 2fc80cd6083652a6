"""The directory in which an export lies until it is whole, with a journal of what is on the disk, for whoever writes the same next.

The journal is text: a digest of all that decides the bytes, then a line for each part that was synced, with the inode of its file: where an
old target was swapped in and not yet deleted, its files lie under the same names. What is written is `stream.py`'s.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotune import __version__
from nemotune.errors import ConflictError

JOURNAL = "journal"
Ends = Mapping[str, list[int]]  # file -> where each of its parts ends


class Staging:
    """One export's directory while it is written; one process at a time has it. That of an export of another `identity` is emptied.

    `place` says where each file lies. `ends` has, file by file, where each part that was written ends.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], place: Mapping[str, Path]):
        self.path, self.place = path, place
        self.head = hashlib.sha256(json.dumps([__version__, identity], sort_keys=True).encode()).hexdigest()
        self.ends: dict[str, list[int]] = {}
        self._noted: dict[str, int] = {}

    @property
    def num_bytes(self) -> int:
        """What need not be written again."""
        return sum(ends[-1] for ends in self.ends.values() if ends)

    def __enter__(self) -> Staging:
        if self.path.is_file() or self.path.is_symlink():
            self.path.unlink()
        self.path.mkdir(exist_ok=True)
        self._lock()
        self._file.seek(0)
        head, *lines = self._file.read().split("\n")
        noted = _parsed(lines) if head == self.head else {}
        self.ends = {name: ends for (name, _), ends in noted.items()}
        if head != self.head or not all(self._is_there(name, inode, ends[-1]) for (name, inode), ends in noted.items()):
            self._empty()
        self._file.truncate(0)
        self._file.write(self.head + "\n")
        for name, ends in self.ends.items():
            self.note(name, len(ends))
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def note(self, name: str, num_parts: int) -> None:
        """So many parts of the file `name` are on the disk."""
        inode = self.place[name].stat().st_ino
        for end in self.ends[name][self._noted.get(name, 0) : num_parts]:
            self._file.write(json.dumps([name, inode, end]) + "\n")
        self._noted[name] = num_parts
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        """Have the journal alone. Who had it may have ended meanwhile, and have deleted it: then the lock is on a file without a name."""
        try:
            self._file = (self.path / JOURNAL).open("a+", encoding="utf-8", errors="replace")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(self._file.fileno()), (self.path / JOURNAL).stat())
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:
            raise ConflictError(f"{self.path}: another process writes there at this moment; wait for it or write elsewhere")

    def _is_there(self, name: str, inode: int, num_bytes: int) -> bool:
        if name not in self.place or not self.place[name].is_file():
            return False
        found = self.place[name].stat()
        return found.st_ino == inode and found.st_size >= num_bytes

    def _empty(self) -> None:
        self.ends = {}
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != JOURNAL:
                path.unlink()


def _parsed(lines: list[str]) -> dict[tuple[str, int], list[int]]:
    """File with its inode, and ends, up to a line that was cut off."""
    found: dict[tuple[str, int], list[int]] = {}
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            break
        match value:
            case [str(name), int(inode), int(end)]:
                found.setdefault((name, inode), []).append(end)
            case _:
                break
    return found
