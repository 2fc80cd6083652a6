"""Where a model lies: a directory, a built-in model, or a hub repository that is downloaded once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemotune import assets
from nemotune.errors import MissingFileError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "LICENSE*"]  # never Python, never pickles


def locate(path: str | Path, revision: str | None = None) -> Path:
    """The local directory of `path`. Raises MissingFileError where it is none of the three."""
    if (directory := Path(path).expanduser()).is_dir():
        return directory
    if (builtin := assets.resolve(str(path))) is not None:
        return builtin
    if isinstance(path, Path) or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise MissingFileError(f"model.path: {path} is no directory, no built-in model and no hub id (owner/name)")
    return _download(str(path), revision)


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer at `path`, with its chat template where it has one. Raises MissingFileError."""
    from transformers import PreTrainedTokenizerFast

    directory = locate(path, revision)
    if not (directory / "tokenizer.json").is_file():
        raise MissingFileError(f"{directory}: no tokenizer.json; copy the tokenizer's files beside the weights")
    return PreTrainedTokenizerFast.from_pretrained(directory)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingFileError(
            f"model.path: {repository} is no directory here and could not be had from the hub ({reason}); check the name, the network and `hf auth login`"
        ) from error
