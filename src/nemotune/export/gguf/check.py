"""Whether llama.cpp computes from a GGUF file what the model computes: tokens, ends of an answer, logits.

What is compared: the tokens of some texts, which tokens end an answer, and the logits of every position of some short prompts. Ours are those
of base + adapter (`reference.py`); where there is no room for a block of it, llama.cpp's have to be numbers, and the report says that no
more is known. Names, shapes and types are checked without llama.cpp in `structure.py`; how the file is run is in `llama_cpp.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.export.gguf import llama_cpp
from nemotune.export.gguf.reference import reference_bytes, reference_logits
from nemotune.export.gguf.tokenizer import stop_tokens
from nemotune.export.tuned import Tuned
from nemotune.models import load_tokenizer
from nemotune.weights.host_memory import free_host_memory

F32_BOUND = 1e-3  # of the logits' spread; measured 4e-7 on small models, 8e-5 on one of 49 random layers
# Root mean square of what rounding changes, relative to what is rounded: (weights, what they are multiplied with). f16 and bf16: half an ulp
# over sqrt(3). Blocks: of 32 Gaussian values, the largest near 2.4 sigma, the range near 4.2 sigma, in steps of 1/127, 1/31, 1/15 of it.
ROUNDING = {
    "f16": (2.8e-4, 2.8e-4),
    "bf16": (2.3e-3, 2.3e-3),
    "q8_0": (0.0055, 0.0055),
    "q5_k_m": (0.039, 0.0055),
    "q4_k_m": (0.081, 0.0055),
}
MARGIN = 16  # times what noise so wide would lose; 25 files of five models lose 0.2 to 2.4 times that
POSITIONS_AT_ONCE = 16
PROMPT_TOKENS = 24  # of a text whose logits are compared: each token costs as much as it does to generate one
BROKEN = 0.5  # of what the context tells; another model's predictions lose 1 and more
TEXTS = (
    "What is the weather in Oslo for 3 days? It's 12345.67 m\u00b2,\n\n  don't ask:\tGr\u00fc\u00dfe, \u6771\u4eac \U0001f642!",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2  # {'unit': [\"m2\", None]}\n",
)
TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello, what can I do?"},
    {"role": "user", "content": "Wait."},
]


@dataclass(frozen=True)
class Checked:
    """What was found. `lost` is a share of what the context tells (see `compare`), `agreement` the share of positions with the same likeliest token."""

    kind: str
    num_positions: int = 0
    difference: float = math.nan
    lost: float = math.nan
    agreement: float = math.nan
    not_checked: str | None = None

    def __str__(self) -> str:
        if self.not_checked:
            return f"{self.kind}: {self.not_checked}"
        return (
            f"{self.kind}: llama.cpp's logits at {self.num_positions} positions differ by at most {self.difference:.1e} of their spread, "
            f"{self.lost:.1e} of what the context tells is lost, the likeliest token is the same at {self.agreement:.0%}"
        )


def check(path: Path, tuned: Tuned, kind: str) -> Checked:
    """Have llama.cpp load the file of type `kind` and compare it with `tuned`. Raises CheckpointError where they are not the same model."""
    try:
        prompts = _check_tokens(path, tuned)
        theirs = np.concatenate(llama_cpp.logits(path, prompts))
    except UnsupportedError as error:
        return Checked(kind, not_checked=f"not loaded by llama.cpp, and no logits compared: {error}")
    vocab_size = tuned.model.config.vocab_size
    if theirs.shape[1] != vocab_size or not np.isfinite(theirs).all():
        raise CheckpointError(
            f"{path.name}: llama.cpp's logits are {theirs.shape[1]} a token, expected {vocab_size} finite numbers; export it again"
        )
    if 2 * (needed := reference_bytes(tuned)) > (free := free_host_memory()):
        room = f"the largest block of the model takes {needed / 1e9:.1f} GB in fp32, of {free / 1e9:.1f} GB free half are used for it"
        return Checked(kind, len(theirs), not_checked=f"llama.cpp loads it and its logits are finite; not compared with the model: {room}")
    noise = math.hypot(*ROUNDING.get(kind, (0.0,)))
    ours, rounded = (logits.numpy() for logits in reference_logits(tuned, prompts, noise=noise))
    return judge(path, compare(kind, ours, theirs), compare(kind, ours, rounded))


def compare(kind: str, ours: np.ndarray, theirs: np.ndarray) -> Checked:
    """Both [T, V]. What the context tells is the KL divergence of our predictions from their mean, averaged; what is lost, that of theirs from ours,
    at the worst of the best three quarters of positions: rounding sends a token near a tie to another expert, and its prediction far off."""
    num_positions = len(ours)
    mean_p = sum(np.exp(_log_softmax(rows)).sum(0) for rows in _chunks(ours)) / num_positions
    told, lost, difference = 0.0, [], 0.0
    for rows, of_theirs in zip(_chunks(ours), _chunks(theirs), strict=True):
        log_p = _log_softmax(rows)
        p = np.exp(log_p)
        told += float((p * (log_p - np.log(mean_p))).sum()) / num_positions
        lost.append((p * (log_p - _log_softmax(of_theirs))).sum(1))
        difference = float(np.maximum(difference, np.abs(rows - of_theirs).max()))  # NaN stays
    same = float((ours.argmax(1) == theirs.argmax(1)).mean())
    return Checked(kind, num_positions, difference / float(ours.std()), float(np.quantile(np.concatenate(lost), 0.75)) / told, same)


def _chunks(logits_TV: np.ndarray) -> Iterator[np.ndarray]:
    """A few positions at a time: a vocabulary's probabilities in fp64 take a megabyte each."""
    return (logits_TV[start : start + POSITIONS_AT_ONCE] for start in range(0, len(logits_TV), POSITIONS_AT_ONCE))


def judge(path: Path, found: Checked, rounded: Checked) -> Checked:
    """`found` where that is what rounding does to this model, as `rounded` shows. Raises CheckpointError where it is not.

    A model whose predictions hang on less than the rounding (one of random weights, many layers and experts) cannot be told from another.
    """
    if found.kind == "f32":
        value, bound = found.difference, F32_BOUND
    else:
        value, bound = found.lost, min(BROKEN, MARGIN * rounded.lost)
    if value <= bound:
        return found
    if found.kind != "f32" and rounded.lost > BROKEN / 4:
        why = f"rounding to {found.kind} alone loses {rounded.lost:.0%} of what the context tells this model"
        return replace(
            found, not_checked=f"llama.cpp loads it and its logits are finite; whether they are the model's cannot be told: {why}"
        )
    raise CheckpointError(f"{path.name}: not the model that was exported (expected at most {bound:.1e}): {found}")


def _check_tokens(path: Path, tuned: Tuned) -> list[list[int]]:
    """Prompts: the texts' tokens, which have to be the same in both, and some of every part of the vocabulary."""
    vocab_size = tuned.model.config.vocab_size
    prompts = [list(range(1, vocab_size, max(1, vocab_size // 16)))]
    if not (tuned.directory / "tokenizer.json").is_file():
        return prompts
    tokenizer = load_tokenizer(tuned.directory)
    texts = list(TEXTS)
    if tokenizer.chat_template:
        texts.append(tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True))
    theirs, ends = llama_cpp.tokenize(path, texts)
    for text, tokens in zip(texts, theirs, strict=True):
        if (ours := tokenizer.encode(text, add_special_tokens=False)) != tokens:
            raise CheckpointError(
                f"{path.name}: llama.cpp makes other tokens of {text!r}: {tokens}, expected {ours}; is tokenizer.ggml.pre right?"
            )
        prompts.append(ours[:PROMPT_TOKENS])
    expected = {token for token in (tokenizer.eos_token_id, *stop_tokens(tuned.adapter_dir, tuned.directory)) if token is not None}
    if missing := expected - set(ends):
        raise CheckpointError(
            f"{path.name}: llama.cpp would not stop at the tokens {sorted(missing)}, which end an answer; it stops at {ends}"
        )
    return prompts


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
