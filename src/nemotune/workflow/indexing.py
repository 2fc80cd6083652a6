"""The stage `data index`: texts to a dataset in Megatron's form. How they are tokenised and written is in `nemotune.data.megatron`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from rich.console import Console

from nemotune.data.megatron.encoders import TIKTOKEN, DocumentEncoder, ModelEncoder, TiktokenEncoder
from nemotune.data.megatron.index import index_texts, sum_or_none
from nemotune.data.megatron.writer import require_free, token_dtype
from nemotune.data.sources import count_rows
from nemotune.models import load_tokenizer
from nemotune.recipe.schema import Source
from nemotune.workflow.messages import say, wrote


def index(
    sources: Sequence[str], *, tokenizer: str, output: Path, text_key: str | None, bos: bool, eos: bool, workers: int | None,
    overwrite: bool, dry_run: bool, console: Console,
) -> None:  # fmt: skip
    """Write `output`.bin and `output`.idx, a document for each row of `sources`."""
    prefix = output.with_suffix("") if output.suffix in (".bin", ".idx") else output
    require_free(prefix, overwrite=overwrite)
    by_tiktoken = tokenizer.startswith(TIKTOKEN)
    encoder = TiktokenEncoder(tokenizer.removeprefix(TIKTOKEN)) if by_tiktoken else ModelEncoder(load_tokenizer(tokenizer))
    encode = DocumentEncoder(encoder, bos=bos, eos=eos)
    dtype = token_dtype(encoder.vocab_size)
    if dry_run:
        rows = sum_or_none([count_rows(Source(path=source)) for source in sources])
        say(
            console,
            f"would tokenise {'the' if rows is None else f'{rows:,}'} rows of {', '.join(sources)} into {prefix}.bin and {prefix}.idx ({dtype})",
        )
        return
    found = index_texts(sources, prefix, encode, text_key=text_key, workers=workers, overwrite=overwrite)
    for line in found.told():
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    say(console, f"{found.documents:,} documents, {found.tokens:,} tokens, {dtype}, in {prefix}.bin and {prefix}.idx")
    model = "" if by_tiktoken else f" model.path={quote(tokenizer)}"
    wrote(console, prefix.with_name(f"{prefix.name}.idx"), then=f"nemotune data pretrain-nano-30b{model} data.train={quote(str(prefix))}")
