"""The command line as a person meets it: a process of its own, its words in, its output and exit code out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import nemotune

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """`command("run", "quickstart")` runs `nemotune run quickstart` in an empty directory; script="finetune" runs that one."""
    source = str(Path(nemotune.__file__).parent.parent)

    def run(*words: str, script: str = "main") -> subprocess.CompletedProcess[str]:
        code = f"import sys; from nemotune.cli.{script} import main; sys.argv[0] = 'nemotune'; main()"
        environment = os.environ | {"PYTHONPATH": source, "COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}
        return subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    return run
