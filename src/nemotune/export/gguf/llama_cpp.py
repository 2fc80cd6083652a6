"""llama.cpp as a judge of what was exported: it loads a GGUF file and says its tokens, its logits and what it would answer.

It runs in a process of its own (`llama_cpp_process.py`): a file that aborts the native code is an error here, with its last words. Whether
the numbers are right is judged in `check.py`.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.export.gguf.llama_cpp_process import INSTALL, UNUSABLE


def is_installed() -> bool:
    """Whether the extra is there."""
    return find_spec("xllamacpp") is not None


def tokenize(path: Path, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
    """The tokens that the file's vocabulary makes of each text, special ones by their spelling, and every token that ends a generation."""
    found = _ask(path, {"texts": list(texts)})
    return found["tokens"], found["ends"]


def logits(path: Path, prompts: Sequence[Sequence[int]], *, adapter: Path | None = None) -> list[np.ndarray]:
    """For each prompt the logits [T, V] of all its positions, with the GGUF file `adapter` on top.

    Raises CheckpointError where llama.cpp cannot load or run a file.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "logits.npz"
        _ask(path, {"prompts": [list(prompt) for prompt in prompts], "out": str(out), "adapter": adapter and str(adapter)})
        with np.load(out) as arrays:
            return [arrays[f"arr_{index}"] for index in range(len(prompts))]


def generate(path: Path, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Collection[int]) -> list[list[int]]:
    """The most likely continuation of each prompt, up to its first stop token (included)."""
    asked = {"continue": [list(prompt) for prompt in prompts], "max_new_tokens": max_new_tokens, "stop_ids": sorted(stop_ids)}
    return _ask(path, asked)["answers"]


def chat(path: Path, conversations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What llama.cpp's server answers to each request (OpenAI's form: messages, tools, max_tokens), by the file's own chat template."""
    return _ask(path, {"chat": list(conversations)})["chat"]


def _ask(path: Path, question: dict[str, Any]) -> Any:
    """Put the question to a process that loads the file. Raises UnsupportedError where the file is not to blame."""
    if not is_installed():
        raise UnsupportedError(f"xllamacpp is not installed, so {path.name} cannot be run; {INSTALL}")
    command = [sys.executable, "-P", "-m", "nemotune.export.gguf.llama_cpp_process", str(path)]
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory) / "answer.json"
        process = subprocess.run([*command, str(answer)], input=json.dumps(question), text=True, errors="replace", capture_output=True)
        if process.returncode == 0:
            return json.loads(answer.read_text(encoding="utf-8"))
    if process.returncode == UNUSABLE:
        raise UnsupportedError(process.stderr.strip().splitlines()[-1])
    if process.returncode == -signal.SIGKILL:
        raise UnsupportedError(f"{path.name}: llama.cpp was killed while it ran it, as where memory is short")
    how = f"was ended by signal {-process.returncode}" if process.returncode < 0 else "failed"
    raise CheckpointError(f"{path.name}: llama.cpp {how} on it; its last words:\n{_last_words(process.stderr)}")


def _last_words(text: str, count: int = 4) -> str:
    """The end of the log: its complaints, where it has any."""
    lines = [line for line in text.splitlines() if line.strip(" .")]
    complaints = [line for line in lines if re.search(r"error|fail|assert|invalid", line, re.IGNORECASE)]
    return "\n".join(f"  {line}" for line in (complaints or lines)[-count:])
