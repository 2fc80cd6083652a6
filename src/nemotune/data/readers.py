"""Readers of one data file each, by suffix. Each yields rows one at a time and holds one row or one record batch in memory.

An unreadable file is a DataError that names it, and the line where the file has lines.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from nemotune.errors import DataError

Row = dict[str, Any]
CHUNK = 1 << 20  # characters read at a time from a JSON array
SEPARATORS = re.compile(r"[\s,]*")


def without_nested_nulls(row: Row) -> Row:
    """The row with nulls inside its nested values left out: Arrow gives each struct every key that any row has."""
    return {key: _pruned(value) for key, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(item) for key, item in value.items() if item is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value


def _jsonl(file: Path) -> Iterator[Row]:
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _object(_parsed(line, file, number), file, number)


def _json(file: Path) -> Iterator[Row]:
    """An array of objects, or, as many published .json files are, one object a line."""
    with _opened(file) as text:
        start = next((character for character in iter(lambda: text.read(1), "") if not character.isspace()), "")
    yield from _array(file) if start == "[" else _jsonl(file)


def _array(file: Path) -> Iterator[Row]:
    """The objects of a JSON array, decoded one by one from a buffer that grows only where an object is cut by its end."""
    decoder = json.JSONDecoder()
    with _opened(file) as text:
        buffer, line = text.read(CHUNK), 1
        at = buffer.index("[") + 1
        while True:
            after = SEPARATORS.match(buffer, at).end()  # type: ignore[union-attr]
            line, at = line + buffer.count("\n", at, after), after
            if buffer.startswith("]", at):
                return
            try:
                value, end = decoder.raw_decode(buffer, at)
            except json.JSONDecodeError as error:
                more = text.read(max(CHUNK, len(buffer) - at)) if _is_cut(error, buffer) else ""
                if not more:
                    raise _broken(file, line + buffer.count("\n", at, error.pos), _array_problem(error, buffer)) from error
                buffer, at = buffer[at:] + more, 0
                continue
            yield _object(value, file, line)
            line += buffer.count("\n", at, end)
            at = end


def _is_cut(error: json.JSONDecodeError, buffer: str) -> bool:
    """Whether the buffer's end, rather than the text, is what stopped the decoder."""
    return error.msg.startswith("Unterminated") or error.pos >= len(buffer) - 12  # 12: longer than any literal or escape


def _array_problem(error: json.JSONDecodeError, buffer: str) -> str:
    ended = error.msg.startswith("Unterminated") or error.pos >= len(buffer.rstrip())
    return "the file ends inside the array; it seems cut off" if ended else error.msg


def _csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 27)
    with _opened(file, newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise _broken(file, reader.line_num, f"expected {len(reader.fieldnames or ())} columns as in the header line")
                yield row
        except csv.Error as error:
            raise _broken(file, reader.line_num, str(error)) from error


def _txt(file: Path) -> Iterator[Row]:
    """One document for each block of lines between blank lines, its inner line breaks kept."""
    block: list[str] = []
    with _opened(file) as lines:
        for line in lines:
            if line.strip():
                block.append(line)
            elif block:
                yield {"text": "".join(block).rstrip("\n")}
                block = []
    if block:
        yield {"text": "".join(block).rstrip("\n")}


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    yield from _batches(file, lambda: pq.ParquetFile(file, memory_map=True).iter_batches(batch_size=1024))


def _arrow(file: Path) -> Iterator[Row]:
    """Both kinds of Arrow file: the one with a footer, and the stream that `datasets` writes."""
    import pyarrow as pa

    def read() -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(file)) as source:
            footed = source.read(6) == b"ARROW1"
        mapped = pa.memory_map(str(file))
        if not footed:
            yield from pa.ipc.open_stream(mapped)
            return
        reader = pa.ipc.open_file(mapped)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)

    yield from _batches(file, read)


def _batches(file: Path, read: Callable[[], Iterator[Any]]) -> Iterator[Row]:
    import pyarrow as pa

    try:
        for batch in read():
            for row in batch.to_pylist():
                yield without_nested_nulls(row)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: unreadable ({error}); it may be cut off or of another format, fetch it again") from error


class _opened:
    """The file as text; bytes that are not UTF-8 are a DataError that names it."""

    def __init__(self, file: Path, newline: str | None = None) -> None:
        self.file, self.text = file, file.open(encoding="utf-8-sig", newline=newline)

    def __enter__(self) -> TextIO:
        return self.text

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.text.close()
        if isinstance(error, UnicodeDecodeError):
            raise DataError(f"{self.file}: not UTF-8 text ({error.reason} near byte {error.start}); convert it to UTF-8") from error


def _parsed(line: str, file: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise _broken(file, number, f"{error.msg} at column {error.colno}") from error


def _object(value: Any, file: Path, number: int) -> Row:
    if not isinstance(value, dict):
        raise _broken(file, number, f"got {type(value).__name__}, expected an object with the row's fields")
    return value


def _broken(file: Path, line: int, problem: str) -> DataError:
    return DataError(f"{file}, line {line}: {problem}; mend or remove that line")


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".arrow": _arrow, ".txt": _txt,
}  # fmt: skip


def count_rows_of(file: Path) -> int:
    """How many rows the file's reader gives, without parsing them where that can be told; of .jsonl the lines, blank ones too."""
    if file.suffix.lower() == ".jsonl":
        with file.open("rb") as lines:
            return sum(1 for _ in lines)
    if file.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        with contextlib.suppress(pa.ArrowException, OSError):  # the reader says what is wrong
            return pq.read_metadata(file).num_rows
    return sum(1 for _ in READERS[file.suffix.lower()](file))
