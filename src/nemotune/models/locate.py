"""Where a model lies: a directory, a built-in model, or a hub repository that is downloaded once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemotune import assets
from nemotune.errors import CheckpointError, MissingFileError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WEIGHTS = ["*.safetensors"]
BESIDE_WEIGHTS = [
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "LICENSE*",
    "NOTICE*",
    "README.md",
]  # config, index, tokenizer, template, licence and the card that names it; never Python, never pickles


def locate(path: str | Path, revision: str | None = None, *, weights: bool = True, key: str = "model.path") -> Path:
    """The local directory of `path`; without `weights`, of a hub repository only the small files are downloaded.

    Raises MissingFileError, which begins with the `key` that names it, where it is none of the three, RecipeError for a revision of what has none.
    """
    directory = Path(path).expanduser()
    local = directory if directory.is_dir() else assets.resolve(str(path))
    if local and revision:
        raise RecipeError(
            f"model.revision: got '{revision}', expected null: {path} is on this disk, and only a hub repository has revisions"
        )
    if local:
        return local
    if isinstance(path, Path) or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise MissingFileError(f"{key}: {path} is no directory, no built-in model and no hub id (owner/name)")
    return _download(str(path), revision, [*WEIGHTS, *BESIDE_WEIGHTS] if weights else BESIDE_WEIGHTS, key)


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer at `path`, with its chat template where it has one. Raises MissingFileError, CheckpointError."""
    from transformers import PreTrainedTokenizerFast

    directory = locate(path, revision, weights=False)
    if not (directory / "tokenizer.json").is_file():
        raise MissingFileError(f"{directory}: no tokenizer.json; copy the tokenizer's files beside the weights")
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # tokenizers raises nothing more special
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{directory}: its tokenizer cannot be read ({reason}); copy tokenizer.json and tokenizer_config.json again"
        ) from error


def _download(repository: str, revision: str | None, patterns: list[str], key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingFileError(
            f"{key}: {repository} is no directory here and could not be had from the hub ({reason}); check the name, the network and `hf auth login`"
        ) from error
