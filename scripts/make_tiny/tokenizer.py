"""The byte-level BPE tokenizer: Nemotron-3's special tokens and word splitting, with tokens learnt from our own text.

The splitting is a copy of Nemotron-3's, digit by digit and case by case, so that other programs know it by the same name
(`pixtral` in GGUF files). The first 18 tokens have Nemotron-3's ids. The merges come from a finer splitting, in which a letter
never stands with a space or a sign: a word is the same token in a sentence, in a function's name and alone on a line, so that
a small model sees at once that they are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE = 1504  # a multiple of 8: GGUF readers refuse others for nemotron_h
_CONTROL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
            "[TOOL_CALLS]", "<|im_start|>", "<|im_end|>")  # fmt: skip
_VISIBLE = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")  # stay in decoded text
_SPARE = tuple(f"<SPECIAL_{i}>" for i in range(18, 32))
_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LEARNING_SPLIT = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s"


def train(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer whose merges come from `texts`; the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = _splitter(_LEARNING_SPLIT)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True)
    special = [AddedToken(text, special=True, normalized=False) for text in _CONTROL + _VISIBLE + _SPARE]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = _splitter(_SPLIT)
    return tokenizer


def _splitter(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] not in _VISIBLE
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<unk>",
        "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False, "model_max_length": 4096,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
