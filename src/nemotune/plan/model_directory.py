"""Whether a model directory can be tuned and talked to: what `nemotune doctor DIR` tells, one line a check.

Tensors are known by their shards' headers; of embeddings and head the rows are read as well, some at a time, since those of chat tokens
may be near zero in a base. Whether the model fits in memory is another question (`cost.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nemotune import assets
from nemotune.data.example import Example, RowError
from nemotune.data.progress import progress
from nemotune.data.template import Renderer
from nemotune.errors import DataError, MissingFileError, NemotuneError
from nemotune.export import untrained_rows
from nemotune.files import read_json
from nemotune.models import CausalLM, LlamaConfig, NemotronHConfig, load_tokenizer, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Check", "check_model"]

UNREADABLE = (NemotuneError, OSError)  # what is wrong with a file, or with who may read it
Config = NemotronHConfig | LlamaConfig
TOLD_TOKENS = 10
CHAT_TOKEN = re.compile(r"<\|(im_start|im_end|start_header_id|end_header_id|eot_id|eom_id)\|>|</?think>|</?\w*tool\w*>", re.IGNORECASE)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather of a city", "parameters": PARAMETERS}}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
PLAIN = Example(messages=({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning."}))
WITH_TOOLS = Example(
    messages=(
        {"role": "user", "content": "How is the weather in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ),
    tools=(TOOL,),
)


@dataclass(frozen=True)
class Check:
    """What was found, and for a warning or an error what to do about it."""

    name: str
    status: Literal["ok", "warning", "error"]
    message: str


def check_model(path: str) -> list[Check]:
    """Every check of the model in directory `path`, or built in; one that needs a part that is broken is left out. Raises MissingFileError."""
    return list(_checks(model_directory(path)))


def model_directory(path: str) -> Path:
    """The directory `path`, or that of a built-in model. Raises MissingFileError."""
    directory = Path(path).expanduser()
    if not path or not directory.is_dir():
        builtin = assets.resolve(path)
        if builtin is None:
            raise MissingFileError(f"MODEL_DIR: '{path}' is no directory, expected one with config.json, *.safetensors and tokenizer.json")
        directory = builtin
    return directory


def _checks(directory: Path) -> Iterator[Check]:
    config = tokenizer = renderer = None
    try:
        config = read_config(directory)
        yield Check("config", "ok", f"{config.raw['model_type']}, {config.num_layers} layers, vocabulary of {config.vocab_size:,}")
    except UNREADABLE as error:
        yield Check("config", "error", str(error))
    model = weights = None
    if config:
        try:
            model = untrained_rows.open_tables(directory)
            weights = _weights(model)
        except UNREADABLE as error:
            weights = Check("weights", "error", str(error))
        yield weights
    try:
        tokenizer = load_tokenizer(directory)
        yield _tokenizer(tokenizer, config)
    except UNREADABLE as error:
        yield Check("tokenizer", "error", str(error))
    if tokenizer and model and weights and weights.status == "ok":
        yield from _rows(directory, model, tokenizer)
    if tokenizer:
        try:
            renderer = Renderer(tokenizer)
            yield _template(renderer)
        except DataError as error:
            yield Check("template", "warning", str(error))
    if tokenizer and config:
        yield from _stops(directory, renderer or Renderer(tokenizer, template="none"), config)


def _weights(model: CausalLM) -> Check:
    """Names and shapes were compared with the config; dtypes and sizes from the headers."""
    checkpoint = model.source
    assert checkpoint is not None
    dtypes = sorted({info.dtype for info in checkpoint.tensors.values()})
    files = len({info.file for info in checkpoint.tensors.values()})
    count = f"{len(checkpoint.tensors):,} tensors in {files} file{'s' * (files > 1)}"
    return Check("weights", "ok", f"{count}, {checkpoint.num_bytes / 1e9:.2f} GB, {', '.join(dtypes)}")


def _tokenizer(tokenizer: PreTrainedTokenizerFast, config: Config | None) -> Check:
    largest = max(tokenizer.get_vocab().values())
    if config and largest >= config.vocab_size:
        return Check(
            "tokenizer", "error",
            f"has the id {largest}, and config.json a vocabulary of {config.vocab_size}; copy the tokenizer that belongs to these weights",
        )  # fmt: skip
    return Check("tokenizer", "ok", f"{len(tokenizer):,} tokens")


def _rows(directory: Path, model: CausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[Check]:
    """Rows of embeddings and head that are near zero, by their tokens. Rows that belong to no token are never looked up."""
    assert model.source is not None
    with progress("reading embeddings", total=untrained_rows.num_rows(model)) as advance:
        try:
            tables = untrained_rows.scan(model, done=advance)
        except UNREADABLE as error:
            yield Check("embeddings", "error", str(error))
            return
    for kind, table in tables.items():
        vocabulary = tokenizer.convert_ids_to_tokens(table.near_zero)
        tokens = [(number, token) for number, token in zip(table.near_zero, vocabulary, strict=True) if token is not None]
        counted = f"{len(table.rms_V):,} rows, the median's RMS {table.median:.2g}"
        if not tokens:
            yield Check(kind, "ok", f"{counted}, none of a token near zero")
            continue
        told = ", ".join(f"{token} ({number})" for number, token in tokens[:TOLD_TOKENS])
        more = f" and {len(tokens) - TOLD_TOKENS:,} more" if len(tokens) > TOLD_TOKENS else ""
        of_chats = [token for _, token in tokens if CHAT_TOKEN.fullmatch(token)]
        chats = f"tokens of chats are among them: {', '.join(of_chats)}" if of_chats else "no token of chats is among them"
        yield Check(
            kind, "warning",
            f"{counted}, {len(tokens):,} near zero (under {untrained_rows.NEAR_ZERO:g} of that): {told}{more}; {chats}. "
            f"Gradients through such rows may be Inf: nemotune doctor {directory} --repair OUT writes a model with the mean of the others there",
        )  # fmt: skip


def _template(renderer: Renderer) -> Check:
    """Both conversations rendered, with a loss mask that can be trusted."""
    named = renderer.template_name
    try:
        renderer.encode(PLAIN)
    except RowError as error:
        return Check(
            "template", "error", f"{named} cannot render a greeting and its answer ({error}); set data.template to chatml or a Jinja file"
        )
    try:
        renderer.encode(WITH_TOOLS)
    except RowError as error:
        return Check(
            "template",
            "warning",
            f"{named} renders plain conversations, but none with tools ({error}); for such rows set data.template=chatml",
        )
    return Check("template", "ok", f"{named}, with tools and without")


def _stops(directory: Path, renderer: Renderer, config: Config) -> Iterator[Check]:
    """The tokens that end an answer, and whether those who serve this directory will know them."""
    try:
        stops = sorted({*config.eos_token_id, *renderer.stop_ids})
    except DataError as error:
        yield Check("stop tokens", "error", str(error))
        return
    vocabulary = renderer.tokenizer.convert_ids_to_tokens(stops)
    unknown = [number for number, token in zip(stops, vocabulary, strict=True) if token is None or number >= config.vocab_size]
    if unknown or not stops:
        what = (
            f"config.json's eos_token_id {unknown} is no token of the tokenizer"
            if unknown
            else "neither config.json nor the tokenizer names one"
        )
        yield Check("stop tokens", "error", f"{what}, so an answer would not end; set eos_token_id in config.json")
        return
    yield Check("stop tokens", "ok", ", ".join(f"{token} ({number})" for number, token in zip(stops, vocabulary, strict=True)))
    yield _generation(directory, stops)


def _generation(directory: Path, stops: list[int]) -> Check:
    path, name = directory / "generation_config.json", "generation"
    beside = "nemotune writes a whole one beside what it trains"
    if not path.is_file():
        return Check(name, "warning", f"no {path.name}, so others stop at config.json's token alone; {beside}")
    try:
        settings = read_json(path, remedy="mend it or delete it")
    except UNREADABLE as error:
        return Check(name, "error", str(error))
    eos = settings.get("eos_token_id")
    lacking = sorted({*stops} - {*(eos if isinstance(eos, list) else [eos])})
    if lacking:
        return Check(
            name, "warning", f"its eos_token_id {eos} lacks {lacking}, which end answers too: served as it is, it may not stop; {beside}"
        )
    return Check(name, "ok", f"eos_token_id {eos}")
