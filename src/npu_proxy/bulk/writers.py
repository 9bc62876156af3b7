"""Stream vectors to files. Each format is one class and one row of a table.

Files are written atomically: writers write NAME.partial and rename it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from npu_proxy.errors import InputError
from npu_proxy.types import DType, EmbedResult


class Sink(Protocol):
    """Receives results in order. The file is complete only after ``close``."""

    def write(self, result: EmbedResult, first: int) -> None:
        """Append a batch whose first text has index ``first``."""
        ...

    def close(self) -> None: ...


class NpySink:
    """One .npy array [n, width], written incrementally; the header is completed at the end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._rows, self._width = 0, 0
        self._kind = np.dtype(np.float32)

    def write(self, result: EmbedResult, first: int) -> None:
        if isinstance(result.embeddings, list):
            raise InputError("the npy format cannot store base64; write jsonl or parquet, or choose another dtype", param="dtype")
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
    """One JSON object per text: index, embedding, tokens, truncated; if it failed, embedding is null and `error` is added."""

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


class VectorWriter:
    """A context manager around a sink: renames the file to its final name on success, and removes it otherwise."""

    def __init__(self, path: Path | None, dtype: DType = DType.FLOAT32) -> None:
        """``path``: .npy, .jsonl or .parquet; None writes jsonl to standard output. Raises InputError."""
        self._path = path
        if path is None:
            self._sink: Sink = JsonlSink(sys.stdout.buffer)
            return
        if path.suffix.lower() not in _SINKS:
            raise InputError(f"`{path}`: unknown file format; supported: {', '.join(_SINKS)}", param="output")
        if path.suffix.lower() == ".npy" and dtype is DType.BASE64:
            raise InputError("the npy format cannot store base64; write jsonl or parquet, or choose another dtype", param="dtype")
        if not path.parent.is_dir():
            raise InputError(f"`{path.parent}` is not a folder; create it first", param="output")
        self._partial = path.with_name(path.name + ".partial")
        try:
            self._sink = _SINKS[path.suffix.lower()](self._partial)
        except OSError as error:
            raise InputError(f"`{path}` cannot be written: {error.strerror}", param="output") from error

    def write(self, result: EmbedResult, first: int) -> None:
        """Append a batch whose first text has index ``first``."""
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
