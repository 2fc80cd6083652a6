"""What `nemotune data RECIPE` prints: how many rows became what, how long they are, which were rejected, and samples token by token.

Reads prepared data only; the numbers are those of stats.json.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from nemotune.data.megatron.stream import Stream
from nemotune.data.prepare import Prepared
from nemotune.data.split import Document

BAR = 40  # characters of the longest histogram bar
BEFORE, AFTER = 160, 320  # tokens shown before and from the first trained one
TRAINED, CONTEXT = ("black on green", "black on bright_green"), ("default", "bright_black")  # alternating, so that token borders show


def show(prepared: Prepared, tokenizer: PreTrainedTokenizerFast, console: Console, *, samples: int = 2) -> None:
    """Print the summary and the first `samples` training documents."""
    stats = prepared.stats
    if isinstance(prepared.train, Stream):
        _show_blend(prepared.train, stats, tokenizer, console, samples=samples)
        return
    console.print(_splits(stats))
    console.print(f"template: {stats['template']}   fingerprint: {stats['fingerprint']}", style="dim", markup=False, highlight=False)
    console.print(_sources(stats["sources"]))
    for name, rows in stats["in_train_too"].items():
        if rows:
            console.print(f"{rows} {name} rows are trained on as well, word for word: scores on those say nothing", style="bold red")
    if tested := stats["in_validation_too"]:
        console.print(f"{tested} test rows are validated on as well, word for word: the best weights were chosen by them", style="bold red")
    console.print(_lengths(stats["splits"]["train"]["length"], limit=stats["settings"]["sequence_length"]))
    for number in range(min(samples, len(prepared.train))):
        document = prepared.train[number]
        head = f"document {number}: row {document.row}, {len(document.tokens)} tokens, {int(document.mask[1:].sum())} trained"
        _show_document(head, document, tokenizer, console)


def _show_document(head: str, document: Document, tokenizer: PreTrainedTokenizerFast, console: Console) -> None:
    plain = console.color_system is None
    console.print(Text(head + (" ⟦like this⟧" if plain else " (on green)"), style="bold"))
    console.print(Padding(tokens_shown(document, tokenizer, plain=plain), (0, 0, 1, 2)))


def _show_blend(stream: Stream, stats: dict[str, Any], tokenizer: PreTrainedTokenizerFast, console: Console, *, samples: int) -> None:
    """The datasets with what the run reads of each, the held-out splits, and the first document of the first rows."""
    train = stats["splits"]["train"]
    console.print(_datasets(train["datasets"]))
    settings = stats["settings"]
    console.print(f"the run: {train['rows_of_the_run']:,} rows of {settings['sequence_length']:,} tokens", markup=False, highlight=False)
    for name, split in stats["splits"].items():
        if name != "train":
            console.print(Text(f"{name}: {split['documents']:,} documents, {split['tokens']:,} tokens"))
    if stats["sources"]:
        console.print(_sources(stats["sources"]))
    console.print(f"fingerprint: {stats['fingerprint']}", style="dim", markup=False, highlight=False)
    for row in range(min(samples, len(stream.packs))):
        document = stream[int(stream.packs[row][0])]
        place, _ = stream.row(row)
        _show_document(f"row {row}: of {stream.parts[place].prefix}, {len(document.tokens)} tokens", document, tokenizer, console)


def _datasets(datasets: list[dict[str, Any]]) -> RenderableType:
    table = Table(title="Blend", title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("dataset", overflow="fold")
    for column in ("docs", "tokens", "rows", "share", "epochs"):
        table.add_column(column, justify="right", no_wrap=True)
    for found in datasets:
        counts = [f"{found[key]:,}" for key in ("documents", "tokens", "rows")]
        table.add_row(found["prefix"], *counts, f"{found['share']:.2%}", f"{found['epochs']:.3g}")
    return table


def _splits(stats: dict[str, Any]) -> RenderableType:
    """Narrow enough for 80 columns."""
    table = Table(title="Prepared data", title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("split", no_wrap=True)
    for column in ("rows", "docs", "packs", "tokens", "trained", "filled", "cut", "dropped"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, split in stats["splits"].items():
        counts = [f"{split[key]:,}" for key in ("rows", "documents", "packs", "tokens")]
        shares = [f"{split['mask_share']:.1%}", f"{split['fill_rate']:.1%}"]
        table.add_row(name, *counts, *shares, f"{split['truncated']:,}", f"{split['dropped']:,}")
    return table


def _sources(sources: dict[str, Any]) -> RenderableType:
    """Rows read, and every reason why some were not used or were mended."""
    lines = []
    for name, source in sources.items():
        lines.append(Text(f"data.{name}: {source['rows']:,} rows read, {source['bad']:,} bad"))
        for reason, entry in source["rejected"].items():
            rows = ", ".join(map(str, entry["rows"])) + (", ..." if entry["count"] > len(entry["rows"]) else "")
            lines.append(Text(f"  {entry['count']:,} x {reason}: row {rows}", style="yellow"))
        lines += [Text(f"  {count:,} x mended: {what}", style="dim") for what, count in source["repaired"].items()]
    return Group(*lines)


def _lengths(length: dict[str, Any], *, limit: int) -> RenderableType:
    head = "tokens a document: {min:,} to {max:,}, median {median:,}, 95 % up to {p95:,}; longest seen {longest_seen:,}, limit {limit:,}"
    lines = [Text(head.format(**length, limit=limit))]
    most = max(entry["documents"] for entry in length["histogram"])
    for entry in length["histogram"]:
        bar = "█" * -(-entry["documents"] * BAR // most)
        lines.append(Text(f"  up to {entry['up_to']:>9,} ").append(bar, "cyan").append(f" {entry['documents']:,}"))
    return Group(*lines, Text())


def tokens_shown(document: Document, tokenizer: PreTrainedTokenizerFast, *, plain: bool = False) -> Text:
    """The document's tokens, trained ones highlighted (`plain`: between ⟦ and ⟧), the middle of long texts left out."""
    trained = [False, *document.mask[1:].tolist()]  # nothing precedes the first token: it is never a target
    first = trained.index(True)
    start, end = max(0, first - BEFORE), min(len(trained), first + AFTER)
    text = Text(f"... {start:,} tokens ... " if start else "")
    for at in range(start, end):
        piece = tokenizer.decode([int(document.tokens[at])]).replace("\r", "␍").replace("\n", "⏎\n")
        style = (TRAINED if trained[at] else CONTEXT)[at % 2]
        opens = plain and trained[at] and not (at > start and trained[at - 1])
        closes = plain and trained[at] and (at + 1 == end or not trained[at + 1])
        text.append("⟦" * opens + piece + "⟧" * closes, None if plain else style)
    return text.append(f" ... {len(trained) - end:,} tokens ..." if end < len(trained) else "")
