"""The output of a job, written from its parts while they are computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from npu_proxy.bulk.arrow import compute
from npu_proxy.bulk.rows import ERROR, INDEX, ROW_ID
from npu_proxy.bulk.work_folder import Part, WorkFolder
from npu_proxy.bulk.writers import PLACE, Format, OutputSchema, json_lines, output_tables

_CHECK_SECONDS = 0.5


class _OtherColumns(Exception):
    """A part does not fit the columns of those before."""


class _Closed(Exception):
    """The job has ended before its time."""


class Output:
    """Writes parts to a file in a thread of its own, as if all of them had the columns of the first.

    If that turns out to be wrong, because a later part has another column or a value of another type, everything is written again.
    """

    def __init__(self, work: WorkFolder, form: Format, schema: OutputSchema, *, skip_failed: bool) -> None:
        """schema: makes the schema of parts. skip_failed: leave out rows that failed."""
        self._work = work
        self._format = form
        self._schema = schema
        self._skip_failed = skip_failed
        self._file = work.folder / "output.tmp"
        self._parts: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="npu-proxy-output", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        self._parts.put(None)
        self._thread.join()

    def add(self, part: Part) -> None:
        """Write the next part, which is in the work folder."""
        self._parts.put(part)

    def finish(self) -> Path:
        """Return the whole file, once all parts are written."""
        self._parts.put(None)
        while self._thread.is_alive():
            self._thread.join(_CHECK_SECONDS)
        if self._error is not None:
            schema = self._schema.of(self._work.tables())
            self._write(self._work.tables(), schema)
        return self._file

    def _run(self) -> None:
        try:
            first = self._parts.get()
            if first is not None:
                schema = self._schema.of([self._work.read(first)])
                self._write(self._tables(first, schema), schema)
        except BaseException as error:  # finish writes the file again, and then raises what is wrong
            self._error = error
            with suppress(OSError):
                self._file.unlink(missing_ok=True)

    def _tables(self, first: Part, schema: pa.Schema) -> Iterator[pa.Table]:
        part: Part | None = first
        while part is not None:
            if self._closed.is_set():
                raise _Closed
            table = self._work.read(part)
            if not self._schema.holds(schema, table):
                raise _OtherColumns
            yield table
            part = self._parts.get()

    def _write(self, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        self._format.write(output_tables(tables, schema, skip_failed=self._skip_failed), schema, self._file)


def write_errors(work: WorkFolder, target: Path) -> None:
    """One JSON object per row that failed, in OUTPUT.errors.jsonl; no such file if none failed."""
    file = errors_file(target)
    if not any(part.failed for part in work.parts):
        file.unlink(missing_ok=True)
        return
    unfinished = work.folder / "errors.tmp"
    with unfinished.open("wb") as written:
        for table in work.tables():
            names = [name for name in (INDEX, ROW_ID, PLACE, ERROR) if name in table.schema.names]
            written.write(json_lines(table.filter(compute.is_valid(table[ERROR])).select(names)))
    unfinished.replace(file)


def errors_file(target: Path) -> Path:
    """The file of rows that failed, next to an output."""
    return target.with_name(f"{target.name}.errors.jsonl")
