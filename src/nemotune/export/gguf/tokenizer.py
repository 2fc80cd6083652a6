"""The tokenizer's keys of a GGUF file: a byte-level BPE from tokenizer.json, its special tokens, where an answer ends, and the chat template.

llama.cpp knows the ways to split a text by name; one that it does not know is refused, since the tokens would be others without a word. Types
of tokens are those of convert_hf_to_gguf.py: added tokens that are not special (`<tool_call>`, `<think>`) are kept in what is answered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from nemotune.errors import CheckpointError, UnsupportedError
from nemotune.files import read_json
from nemotune.models import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# llama.cpp's name -> the expression that splits a text, as tokenizer.json has it
SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}  # fmt: skip
# Texts of tokens at which llama.cpp ends an answer whatever the keys say (src/llama-vocab.cpp); the first two end a turn.
ENDS = ("<|im_end|>", "<|eot_id|>", "</s>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<eos>")


def add_tokenizer(writer: GGUFWriter, directory: Path, vocab_size: int, *, template: str | None, stops: Collection[int]) -> None:
    """Vocabulary, special tokens and template. `template` wins over the directory's; `stops` are the tokens at which an answer ends.

    Raises UnsupportedError where llama.cpp would split a text otherwise, CheckpointError where tokens do not fit the embeddings.
    """
    tokenizer_json = read_json(directory / "tokenizer.json", remedy="only tokenizers in that form can be exported")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(tokenizer_json, directory))
    tokenizer = load_tokenizer(directory)
    tokens, types = _vocabulary(tokenizer, directory, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(directory, load_merges=True, n_vocab=vocab_size)
    special.chat_template = template or special.chat_template
    special.special_token_ids |= _ends(tokens, special.special_token_ids.get("eos"), stops)
    special.add_special_token |= _added_around(tokenizer)  # llama.cpp's own default is to begin with <s>
    special.add_to_gguf(writer, quiet=True)


def stop_tokens(*directories: Path | None) -> tuple[int, ...]:
    """The tokens at which an answer ends by the first generation_config.json there is, and by the config.json of the last directory."""
    found: list[int] = []
    for name, among in (("generation_config.json", directories), ("config.json", directories[-1:])):
        path = next((directory / name for directory in among if directory is not None and (directory / name).is_file()), None)
        ids = read_json(path, remedy="copy the model again").get("eos_token_id") if path else None
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if wrong := [each for each in ids if not isinstance(each, int)]:
            raise CheckpointError(f"{path}: eos_token_id: got {wrong[0]!r}, expected the numbers of tokens; copy the model again")
        found += ids
    return tuple(dict.fromkeys(found))


def _split_name(tokenizer_json: dict[str, Any], directory: Path) -> str:
    """llama.cpp's name of how the text is split before its bytes are merged."""
    known, plain, expressions = {expression: name for name, expression in SPLITS.items()}, False, []
    with contextlib.suppress(AttributeError, KeyError, TypeError):  # of another shape than tokenizers have
        model, steps = tokenizer_json["model"], tokenizer_json.get("pre_tokenizer") or {}
        expressions = [step["pattern"].get("Regex") for step in steps.get("pretokenizers", [steps]) if step.get("type") == "Split"]
        plain = model.get("type") == "BPE" and not tokenizer_json.get("normalizer") and model.get("ignore_merges")
    if not plain or len(expressions) != 1 or expressions[0] not in known:
        raise UnsupportedError(
            f"{directory / 'tokenizer.json'}: pre_tokenizer: llama.cpp knows no tokenizer that splits texts like this one, and would make other tokens of "
            f"them; expected that of a Nemotron ({', '.join(SPLITS)}). Serve this model with vLLM"
        )
    return known[expressions[0]]


def _added_around(tokenizer: PreTrainedTokenizerFast) -> dict[str, bool]:
    """Whether the tokenizer puts a token before a text, and one after it."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    return {"bos": whole[:1] != plain[:1], "eos": whole[-1:] != plain[-1:]}


def _vocabulary(tokenizer: PreTrainedTokenizerFast, directory: Path, vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """A token and its type for every row of the embeddings; rows without a token are filled up."""
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    if max(texts) >= vocab_size:
        raise CheckpointError(
            f"{directory}: tokenizer.json has the token {max(texts)}, but the embeddings have {vocab_size} rows; these files belong to different models"
        )
    added, tokens, types = tokenizer.added_tokens_decoder, [], []
    for index in range(vocab_size):
        text, kind = texts.get(index, f"[PAD{index}]"), TokenType.NORMAL if index in texts else TokenType.UNUSED
        if index in added:
            if not added[index].normalized:
                text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
            looks_special = text.startswith("<|") and text.endswith("|>")
            kind = TokenType.CONTROL if added[index].special or looks_special else TokenType.USER_DEFINED
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _ends(tokens: Sequence[str], eos: int | None, stops: Collection[int]) -> dict[str, int]:
    """Keys for the tokens at which llama.cpp has to stop besides `eos`: the end of a turn, and one that it does not know by its text."""
    if unknown := [stop for stop in stops if stop not in range(len(tokens))]:
        raise CheckpointError(f"generation_config.json: eos_token_id: got {unknown[0]}, expected a token of 0 to {len(tokens) - 1}")
    turn = [stop for stop in stops if tokens[stop] in ENDS[:2]]
    others = [stop for stop in stops if tokens[stop] not in ENDS and stop != eos]
    wanted = [*turn[:1], *others]
    if len(wanted) > 2:
        raise UnsupportedError(f"generation_config.json: eos_token_id: got {sorted(stops)}; llama.cpp stops at three of them at most")
    found = dict(zip(("eot", "eom"), wanted, strict=False))
    return found if eos is not None or not stops else found | {"eos": next(iter(stops))}
