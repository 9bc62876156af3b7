"""Stream records and texts from files. Each format is one function and one row of a table. All commands use this module."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Generic, Self, TextIO, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from npu_proxy.errors import InputError

_BATCH_ROWS = 1024
Record = Mapping[str, Any] | str
"""A record's fields by name, or a line of a text file."""
T = TypeVar("T")


@dataclass(kw_only=True)
class Reader(Generic[T]):
    """The items of a file in order. A context manager that closes the file.

    fraction: returns the share of the file read so far, from 0 to 1.
    """

    items: Iterator[T]
    fraction: Callable[[], float]
    close: Callable[[], None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


Records = Reader[tuple[str, Record]]
"""Records, each with its place in the file."""


def open_records(path: Path, columns: Sequence[str] | None = None) -> Records:
    """Open a jsonl, csv, txt or parquet file. columns: the columns that are needed; None means all.

    Raises InputError naming the file, line and field at fault.
    """
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(f"`{path}`: unknown file format; supported: {', '.join(_READERS)}", param="input")
    if not path.is_file():
        raise InputError(f"`{path}` is not a file", param="input")
    return read(path, columns)


def open_texts(path: Path, text_field: str) -> Reader[str]:
    """Open the texts in one field of a file. Raises InputError naming the file, line and field at fault."""
    opened = open_records(path, [text_field])
    texts = (_text(record, text_field, place) for place, record in opened.items)
    return Reader(items=texts, fraction=opened.fraction, close=opened.close)


def read_lines(stream: TextIO) -> Iterator[str]:
    """The lines of a text stream without line endings."""
    for line in stream:
        yield line.rstrip("\r\n")


def _text(record: Record, text_field: str, place: str) -> str:
    if isinstance(record, str):
        return record
    if isinstance(text := record.get(text_field), str):
        return text
    known = ", ".join(map(str, record)) or "none"
    raise InputError(f"{place} has no text in field `{text_field}`; its fields: {known}. Set --text-field", param="text_field")


# -- formats -------------------------------------------------------------------------------------------------------------


def _by_line(
    read: Callable[[io.TextIOWrapper, Path], Iterator[tuple[str, Record]]],
) -> Callable[[Path, Sequence[str] | None], Records]:
    """Turn a reader of line-based text into a function that opens a file and reports its progress."""

    def open_file(path: Path, columns: Sequence[str] | None) -> Records:
        raw = path.open("rb")
        size = max(1, path.stat().st_size)
        stream = io.TextIOWrapper(cast("BinaryIO", raw), encoding="utf-8-sig", newline="")

        def records() -> Iterator[tuple[str, Record]]:
            try:
                yield from read(stream, path)
            except UnicodeDecodeError as error:
                raise InputError(f"`{path}` is not UTF-8: {error.reason} at byte {error.start}", param="input") from error

        return Reader(items=records(), fraction=lambda: raw.tell() / size, close=stream.close)

    return open_file


def _jsonl(stream: io.TextIOWrapper, path: Path) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        place = f"`{path}` line {number}"
        try:
            record: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{place} is not valid JSON: {error.msg}", param="input") from error
        if not isinstance(record, dict):
            raise InputError(f"{place} is not a JSON object, so it has no fields", param="text_field")
        yield place, cast("Mapping[str, Any]", record)


def _csv(stream: io.TextIOWrapper, path: Path) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(stream)
    try:
        for record in reader:
            yield f"`{path}` line {reader.line_num}", record
    except csv.Error as error:
        raise InputError(f"`{path}` line {reader.line_num} is not valid CSV: {error}", param="input") from error


def _txt(stream: io.TextIOWrapper, path: Path) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(read_lines(stream), 1):
        yield f"`{path}` line {number}", line


def _parquet(path: Path, columns: Sequence[str] | None) -> Records:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"`{path}` is not a parquet file: {error}", param="input") from error
    names = file.schema_arrow.names
    for column in columns or ():
        if column not in names:
            known = ", ".join(names)
            raise InputError(f"`{path}` has no column `{column}`; its columns: {known}. Set --text-field", param="text_field")
    total, done = max(1, file.metadata.num_rows), [0]

    def records() -> Iterator[tuple[str, Record]]:
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
            rows: Iterable[Mapping[str, Any]] = batch.to_pylist()
            for record in rows:
                done[0] += 1
                yield f"`{path}` row {done[0]}", record

    return Reader(items=records(), fraction=lambda: done[0] / total, close=file.close)


_READERS: dict[str, Callable[[Path, Sequence[str] | None], Records]] = {
    ".jsonl": _by_line(_jsonl),
    ".csv": _by_line(_csv),
    ".txt": _by_line(_txt),
    ".parquet": _parquet,
}
