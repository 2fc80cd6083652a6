"""Texts to tokens for `nemotune data index`: by a model's tokenizer, or by tiktoken, which is optional and imported here alone, on use.

Raw text stays text: a special token that it spells (`</s>`, `<|endoftext|>`) becomes letters. Both kinds can be sent to other processes.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerFast

from nemotune.errors import MissingFileError, RecipeError, UnsupportedError, did_you_mean

TIKTOKEN = "tiktoken:"  # --tokenizer tiktoken:o200k_base


class Encoder(Protocol):
    """`bos` and `eos` are None where the tokenizer has no such token."""

    vocab_size: int
    bos: int | None
    eos: int | None

    def encode(self, text: str) -> list[int]:
        """The text's tokens, none before and none after."""


class ModelEncoder:
    """By the tokenizer of a Hugging Face directory."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = deepcopy(tokenizer.backend_tokenizer)  # what is set here would change what it does elsewhere
        self._backend.no_truncation()  # some tokenizers bring a length to cut or pad to
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self.vocab_size = len(tokenizer)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._backend.encode_special_tokens = True  # pickling leaves it out


class TiktokenEncoder:
    """By one of tiktoken's encodings. Raises UnsupportedError without the library, RecipeError for a name that it does not have."""

    bos = None

    def __init__(self, name: str) -> None:
        try:
            import tiktoken
        except ModuleNotFoundError as error:
            raise UnsupportedError(
                f"--tokenizer: {TIKTOKEN}{name} needs the library tiktoken, which is not installed; pip install 'nemotune[tiktoken]'"
            ) from error
        known = tiktoken.list_encoding_names()
        if name not in known:
            raise RecipeError(f"--tokenizer: tiktoken has no encoding '{name}', expected {', '.join(known)}.{did_you_mean(name, known)}")
        try:
            self._encoding = tiktoken.get_encoding(name)
        except OSError as error:  # requests': the vocabulary is downloaded once
            raise MissingFileError(
                f"--tokenizer: the vocabulary of {TIKTOKEN}{name} could not be had ({error}); check the network"
            ) from error
        self.vocab_size = self._encoding.n_vocab
        self.eos = self._encoding.eot_token if "<|endoftext|>" in self._encoding.special_tokens_set else None

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)


@dataclass(frozen=True)
class DocumentEncoder:
    """Texts to documents, with a token before or after each where asked."""

    encoder: Encoder
    bos: bool
    eos: bool

    def __post_init__(self) -> None:
        for name, asked in (("bos", self.bos), ("eos", self.eos)):
            if asked and getattr(self.encoder, name) is None:
                raise RecipeError(f"--{name}: the tokenizer has no {name} token; pass --no-{name}, or name another tokenizer")

    def __call__(self, texts: list[str]) -> list[list[int]]:
        before = [self.encoder.bos] if self.bos else []
        after = [self.encoder.eos] if self.eos else []
        return [[*before, *self.encoder.encode(text), *after] for text in texts]  # type: ignore[list-item]
