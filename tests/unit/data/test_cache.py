"""The cache cleans up after preparations that were killed, and leaves those alone that are under way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import nemotune
from nemotune.data.cache import workspace

KILLED = """
import os, signal, sys
from pathlib import Path
from nemotune.data.cache import workspace
with workspace(Path(sys.argv[1])) as work:
    (work / "train.documents.arrow").write_bytes(bytes(1000))
    (work.parent / "train.spool").write_bytes(bytes(1000))
    print(work.parent.name, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_in_the_middle(cache_dir: Path) -> str:
    """Kill a preparation; the directory that it left."""
    environment = os.environ | {"PYTHONPATH": str(Path(nemotune.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(cache_dir)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = done.stdout.strip()
    assert (cache_dir / left / "train.spool").is_file()
    return left


def test_what_a_killed_preparation_left_is_removed_by_the_next(tmp_path):
    (tmp_path / "0123abcd").mkdir()
    kill_in_the_middle(tmp_path)
    with workspace(tmp_path) as work:
        assert {path.name for path in tmp_path.iterdir()} == {"0123abcd", work.parent.name}
        assert not list(work.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["0123abcd"]


ORPHANED = """
import multiprocessing, os, signal
from concurrent.futures import ProcessPoolExecutor
from nemotune.data import workers
pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=workers._start, initargs=(None,))
print(pool.submit(os.getpid).result(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_tokenising_processes_end_with_the_one_that_was_killed():
    environment = os.environ | {"PYTHONPATH": str(Path(nemotune.__file__).parent.parent)}
    with subprocess.Popen([sys.executable, "-c", ORPHANED], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        try:
            parent.communicate(timeout=20)  # the pipe ends with the last process that holds it
        except subprocess.TimeoutExpired:
            os.kill(worker, signal.SIGKILL)
            pytest.fail("the worker goes on without its parent")


def test_preparations_under_way_are_left_alone(tmp_path):
    with workspace(tmp_path) as one:
        (one / "rows").touch()
        with workspace(tmp_path) as other:
            assert (one / "rows").is_file() and other != one
        left = kill_in_the_middle(tmp_path)
        assert (one / "rows").is_file() and left != one.parent.name
        with workspace(tmp_path):
            assert (one / "rows").is_file() and not (tmp_path / left).exists()
    assert not list(tmp_path.iterdir())
