"""What of a directory goes to the hub: found by kind, checked to be whole, and read for what should stay private.

A directory is an adapter, a model or GGUF files. Only files of those are sent; whatever else lies there is named and left.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from nemotune.errors import CheckpointError, DataError, MissingFileError
from nemotune.files import read_json
from nemotune.weights import Checkpoint

__all__ = ["Content", "Kind", "adapter_keys", "kind_of", "of_directory", "refuse_private"]

Kind = Literal["adapter", "model", "gguf"]
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
SENT = (
    "*.safetensors", "*.gguf", "*.safetensors.index.json", "*config.json", "config_*.json", "tokenizer*.json", "*tokens*.json", "vocab.json",
    "*.jinja", "*.model", "merges.txt", "vocab.txt", "Modelfile*", "LICENSE*", "NOTICE*", "Notice*",
)  # fmt: skip
VOCABULARY = ("tokenizer.json", "vocab.*", "merges.txt", "*.model", "*.safetensors", "*.gguf")  # whose texts are of the base
NAME_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path")  # where libraries keep where a model was loaded from
SECRETS = {
    "a token": re.compile(r"\b(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{24,}|AKIA[0-9A-Z]{16}|glpat-[\w-]{20,})"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a path of this machine": re.compile(r"(?<![\w/.])(/home/|/Users/|[A-Za-z]:\\Users\\)[\w.-]+"),
}
STAGED = (".partial", ".incomplete", ".tmp")  # what is not whole yet
CHUNK = 1 << 22


@dataclass(frozen=True)
class Content:
    """A file of the repository: its name there, and the file here or its bytes."""

    name: str
    source: Path | bytes

    @cached_property
    def num_bytes(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        return self._digest(hashlib.sha256())

    @cached_property
    def git_id(self) -> str:
        """As git names it, which the hub's listing gives for small files."""
        return self._digest(hashlib.sha1(f"blob {self.num_bytes}\0".encode(), usedforsecurity=False))

    def _digest(self, digest: hashlib._Hash) -> str:
        if isinstance(self.source, bytes):
            digest.update(self.source)
        else:
            with self.source.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()


def kind_of(directory: Path) -> Kind:
    """What `directory` holds, by its files. Raises MissingFileError where it is not there, DataError where it is none of the three."""
    if not directory.is_dir():
        raise MissingFileError(f"{directory}: no such directory; what is published has to be exported first")
    if (directory / ADAPTER[0]).is_file():
        return "adapter"
    if any(directory.glob("*.gguf")):
        return "gguf"
    if (directory / "config.json").is_file() and any(directory.glob("*.safetensors")):
        return "model"
    raise DataError(f"--what: {directory} holds no adapter (adapter_config.json), no model (config.json, *.safetensors) and no *.gguf")


def of_directory(directory: Path, *, base: str) -> tuple[list[Content], list[str]]:
    """The files to send from `directory`, whole, and the names of those left out; where they name a directory as their base, `base` is put.

    Raises MissingFileError, CheckpointError where one is missing, cut off or still being written.
    """
    kind = kind_of(directory)
    names = sorted(path.name for path in directory.iterdir() if path.name != "README.md")
    if partial := [name for name in names if name.endswith(STAGED) and _is_sent(name.lstrip(".").rpartition(".")[0])]:
        raise CheckpointError(f"{directory / partial[0]}: is still being written, or was cut off; export again before it is published")
    sent = [name for name in names if (directory / name).is_file() and _is_sent(name)]
    {"adapter": adapter_keys, "model": _require_model, "gguf": _require_gguf}[kind](directory)
    return [_content(directory / name, base) for name in sent], [name for name in names if name not in sent]


def _is_sent(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in SENT)


def refuse_private(contents: Iterable[Content], *, secrets: Iterable[str] = (), directories: Iterable[Path] = ()) -> None:
    """Raise DataError where a text that would be sent holds one of `secrets`, what looks like one, or a path into `directories`."""
    homes = {os.path.normpath(path) for path in directories}
    paths = [re.compile(rf"(?<![\w.]){re.escape(home)}(?=[/\s\"')]|$)") for home in homes if len(Path(home).parts) > 1]
    problems = []
    for content in contents:
        if any(fnmatch(content.name, pattern) for pattern in VOCABULARY):
            continue
        raw = content.source if isinstance(content.source, bytes) else content.source.read_bytes()
        text = raw.decode("utf-8", errors="replace")
        found = [what for what, pattern in SECRETS.items() if pattern.search(text)]
        found += ["your token"] if any(secret in text for secret in secrets) else []
        found += ["a path of this machine"] if any(path.search(text) for path in paths) else []
        problems += [f"{content.name}: holds {what}; take it out before this is published" for what in dict.fromkeys(found)]
    if problems:
        raise DataError("\n".join(problems))


def _content(path: Path, base: str) -> Content:
    """The file, with `base` for the directory that it names as its model's."""
    if path.suffix != ".json" or fnmatch(path.name, "*tokenizer.json") or path.name.endswith(".index.json"):
        return Content(path.name, path)
    value = read_json(path, remedy="export it again")
    changed = {key: base for key in NAME_KEYS if isinstance(value.get(key), str) and _is_directory(value[key])}
    if not changed:
        return Content(path.name, path)
    return Content(path.name, (json.dumps({**value, **changed}, indent=2, ensure_ascii=False) + "\n").encode())


def _is_directory(name: str) -> bool:
    return name.startswith(("/", "~", ".")) or "\\" in name or name.count("/") > 1 or Path(name).is_dir()


def adapter_keys(directory: Path) -> list[str]:
    """The names of the tensors of the adapter in `directory`. Raises MissingFileError, CheckpointError where it is not whole."""
    for name in ADAPTER:
        if not (directory / name).is_file():
            raise MissingFileError(f"{directory / name}: no such file; an adapter is both {' and '.join(ADAPTER)}")
    try:
        with safe_open(directory / ADAPTER[1], "pt") as file:
            keys = list(file.offset_keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{directory / ADAPTER[1]}: cannot be read ({error}); train or export it again") from error
    if not keys:
        raise CheckpointError(f"{directory / ADAPTER[1]}: holds no tensor; train or export it again")
    return keys


def _require_model(directory: Path) -> None:
    Checkpoint(directory)  # every header read: no shard is missing or cut off
    read_json(directory / "config.json", remedy="export the model again")


def _require_gguf(directory: Path) -> None:
    from gguf import GGUFReader

    for path in sorted(directory.glob("*.gguf")):
        try:
            GGUFReader(path)  # maps every tensor, the last one to its end
        except (ValueError, IndexError, KeyError) as error:
            raise CheckpointError(f"{path}: cannot be read as GGUF ({error}); export it again") from error
