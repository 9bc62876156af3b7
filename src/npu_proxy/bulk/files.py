"""Texts from files and vectors to files, streamed: a reader and a writer a format, each one row of a table.

A file appears whole or not at all: writers fill NAME.partial and rename it.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from npu_proxy.errors import InputError
from npu_proxy.types import DType, EmbedResult

_BATCH_ROWS = 1024


@dataclass(kw_only=True)
class Source:
    """Texts of a file in order; a context manager. ``fraction`` is how much of it has been read, 0 to 1."""

    texts: Iterator[str]
    fraction: Callable[[], float]
    close: Callable[[], None]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_source(path: Path, text_field: str) -> Source:
    """Open a jsonl, csv, txt or parquet file. Raises InputError naming the file, line and field at fault."""
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(f"`{path}`: unknown kind of file; readable are {', '.join(_READERS)}", param="input")
    if not path.is_file():
        raise InputError(f"`{path}` is not a file", param="input")
    return read(path, text_field)


def _lines(read: Callable[[io.TextIOWrapper, str, Path], Iterator[str]]) -> Callable[[Path, str], Source]:
    """A reader of line-based text that knows how far it is."""

    def open_it(path: Path, text_field: str) -> Source:
        raw = path.open("rb")
        size = max(1, path.stat().st_size)
        stream = io.TextIOWrapper(cast("BinaryIO", raw), encoding="utf-8-sig", newline="")

        def texts() -> Iterator[str]:
            try:
                yield from read(stream, text_field, path)
            except UnicodeDecodeError as error:
                raise InputError(f"`{path}` is not UTF-8: {error.reason} at byte {error.start}", param="input") from error

        return Source(texts=texts(), fraction=lambda: raw.tell() / size, close=stream.close)

    return open_it


def _jsonl(stream: io.TextIOWrapper, text_field: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"`{path}` line {number} is no JSON: {error.msg}", param="input") from error
        yield _field(row, text_field, f"`{path}` line {number}")


def _csv(stream: io.TextIOWrapper, text_field: str, path: Path) -> Iterator[str]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(stream)
    try:
        for row in reader:
            yield _field(row, text_field, f"`{path}` line {reader.line_num}")
    except csv.Error as error:
        raise InputError(f"`{path}` line {reader.line_num} is no CSV: {error}", param="input") from error


def _txt(stream: io.TextIOWrapper, text_field: str, path: Path) -> Iterator[str]:
    for line in stream:
        yield line.rstrip("\r\n")


def _field(row: Any, text_field: str, where: str) -> str:
    if isinstance(row, dict) and isinstance(text := cast("dict[str, Any]", row).get(text_field), str):
        return text
    known = ", ".join(map(str, cast("dict[str, Any]", row))) if isinstance(row, dict) else "none, it is no object"
    raise InputError(f"{where} has no text in field `{text_field}`; its fields: {known}. Set --text-field", param="text_field")


def _parquet(path: Path, text_field: str) -> Source:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"`{path}` is no parquet file: {error}", param="input") from error
    names = file.schema_arrow.names
    if text_field not in names:
        raise InputError(
            f"`{path}` has no column `{text_field}`; its columns: {', '.join(names)}. Set --text-field", param="text_field"
        )
    total, done = max(1, file.metadata.num_rows), [0]

    def texts() -> Iterator[str]:
        for batch in file.iter_batches(_BATCH_ROWS, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                done[0] += 1
                if not isinstance(text, str):
                    raise InputError(f"`{path}` row {done[0]}: column `{text_field}` holds no text", param="input")
                yield text

    return Source(texts=texts(), fraction=lambda: done[0] / total, close=file.close)


_READERS: dict[str, Callable[[Path, str], Source]] = {
    ".jsonl": _lines(_jsonl),
    ".csv": _lines(_csv),
    ".txt": _lines(_txt),
    ".parquet": _parquet,
}


class Sink(Protocol):
    """Takes results in order. ``close`` makes the file complete; leaving it out leaves no file."""

    def write(self, result: EmbedResult, first: int) -> None:
        """Append a batch whose first text has index ``first``."""
        ...

    def close(self) -> None: ...


class NpySink:
    """One .npy array [n, width], written as it comes; the header is completed at the end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._rows, self._width = 0, 0
        self._kind = np.dtype(np.float32)

    def write(self, result: EmbedResult, first: int) -> None:
        if isinstance(result.embeddings, list):
            raise InputError("npy holds no base64; write jsonl, or take another dtype", param="dtype")
        if not self._rows:
            self._width, self._kind = result.embeddings.shape[1], result.embeddings.dtype
            self._header()
        self._file.write(np.ascontiguousarray(result.embeddings).tobytes())
        self._rows += len(result.embeddings)

    def close(self) -> None:
        self._file.seek(0)  # numpy pads the header so that the number of rows can grow in place
        self._header()
        self._file.close()

    def _header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self._kind), "fortran_order": False, "shape": (self._rows, self._width)}
        np.lib.format.write_array_header_1_0(self._file, header)


class JsonlSink:
    """One JSON object a text: index, embedding, tokens, truncated; `error` in place of an embedding that failed."""

    def __init__(self, target: Path | BinaryIO) -> None:
        self._file = target.open("wb") if isinstance(target, Path) else target

    def write(self, result: EmbedResult, first: int) -> None:
        vectors: list[Any] = result.embeddings if isinstance(result.embeddings, list) else result.embeddings.tolist()
        for number, vector in enumerate(vectors):
            error = result.errors[number]
            row: dict[str, Any] = {
                "index": first + number,
                "embedding": None if error else vector,
                "tokens": result.tokens[number],
                "truncated": result.truncated[number],
            }
            row |= {"error": str(error)} if error else {}
            self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not sys.stdout.buffer:
            self._file.close()


class ParquetSink:
    """Columns index, embedding (fixed-size list, or string for base64), tokens, truncated, error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None

    def write(self, result: EmbedResult, first: int) -> None:
        count = len(result.tokens)
        bad = np.array([error is not None for error in result.errors])
        if isinstance(result.embeddings, list):
            embedding: pa.Array = pa.array(result.embeddings, mask=bad)
        else:
            flat = pa.array(np.ascontiguousarray(result.embeddings).reshape(-1))
            width = result.embeddings.shape[1]
            embedding = pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(bad))
        table = pa.table(
            {
                "index": pa.array(range(first, first + count), pa.int64()),
                "embedding": embedding,
                "tokens": pa.array(result.tokens, pa.int32()),
                "truncated": pa.array(result.truncated, pa.bool_()),
                "error": pa.array([str(error) if error else None for error in result.errors], pa.string()),
            }
        )
        self._writer = self._writer or pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is None:
            pq.write_table(pa.table({"index": pa.array([], pa.int64())}), self._path)
        else:
            self._writer.close()


_SINKS: dict[str, Callable[[Path], Sink]] = {".npy": NpySink, ".jsonl": JsonlSink, ".parquet": ParquetSink}


class Target:
    """A context manager around a sink: the file gets its name when all went well, and is removed otherwise."""

    def __init__(self, path: Path | None, dtype: DType = DType.FLOAT32) -> None:
        """``path``: .npy, .jsonl or .parquet; None writes jsonl to standard output. Raises InputError."""
        self._path = path
        if path is None:
            self._sink: Sink = JsonlSink(sys.stdout.buffer)
            return
        if path.suffix.lower() not in _SINKS:
            raise InputError(f"`{path}`: unknown kind of file; writable are {', '.join(_SINKS)}", param="output")
        if path.suffix.lower() == ".npy" and dtype is DType.BASE64:
            raise InputError("npy holds no base64; write jsonl or parquet, or take another dtype", param="dtype")
        if not path.parent.is_dir():
            raise InputError(f"`{path.parent}` is no folder; make it first", param="output")
        self._partial = path.with_name(path.name + ".partial")
        try:
            self._sink = _SINKS[path.suffix.lower()](self._partial)
        except OSError as error:
            raise InputError(f"`{path}` cannot be written: {error.strerror}", param="output") from error

    def write(self, result: EmbedResult, first: int) -> None:
        """Append a batch."""
        self._sink.write(result, first)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._sink.close()
        if self._path is None:
            return
        if error is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink(missing_ok=True)
