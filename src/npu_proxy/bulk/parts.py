"""Gather finished rows into parts of the work folder."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa

from npu_proxy.bulk.arrow import is_json
from npu_proxy.bulk.duplicates import Numbers
from npu_proxy.bulk.readers import Block
from npu_proxy.bulk.rows import INDEX, Pipeline, Rows
from npu_proxy.bulk.work_folder import Part, WorkFolder
from npu_proxy.engine.uninterrupted import interruptible
from npu_proxy.errors import InputError

PART_ROWS = 16_384
_PART_BYTES = 64_000_000
_PART_SECONDS = 30.0
"""A part is finished when it has so many rows or bytes, or after so many seconds."""


class Parts:
    """Gathers finished blocks into parts of the work folder, which a thread of its own writes, one at a time."""

    def __init__(self, work: WorkFolder, finished: Callable[[Part], None], computed: Sequence[str]) -> None:
        """finished: receives each part when it is stored. computed: names of the columns that rows of equal text share."""
        self._work = work
        self._finished = finished
        self._computed = computed
        self._thread = ThreadPoolExecutor(1, "npu-proxy-parts")
        self._written: Future[None] | None = None
        self._being_written: Sequence[pa.Table] = ()
        self._clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)

    def _clear(self) -> None:
        self._tables: list[pa.Table] = []
        self._bytes = 0
        self._texts = hashlib.blake2b(digest_size=16)
        self._began = time.monotonic()

    def skip(self, blocks: Iterator[Block], pipeline: Pipeline) -> None:
        """Read what is done already. Raises InputError if it is not what it was then."""
        for part in self._work.parts:
            found = hashlib.blake2b(digest_size=16)
            for block in itertools.islice(blocks, part.blocks):
                found.update(pipeline.prepare(block).keys.tobytes())
            if found.hexdigest() != part.texts:
                rows = f"rows {part.first} to {part.first + part.rows - 1} (counted from 0)"
                message = f"the texts of {rows} are not what they were when the job began; start again with --overwrite"
                raise InputError(message, param="input")

    def add(self, table: pa.Table, rows: Rows) -> None:
        """Take a finished block."""
        if self._tables and not _goes_with(self._tables[0].schema, table.schema):
            self.flush()
        self._tables.append(table)
        self._bytes += table.nbytes
        self._texts.update(rows.keys.tobytes())
        count = sum(table.num_rows for table in self._tables)
        if count >= PART_ROWS or self._bytes >= _PART_BYTES or time.monotonic() - self._began > _PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Store what there is as a part."""
        self._wait()
        if self._tables:
            self._being_written = self._tables
            self._written = self._thread.submit(self._store, self._tables, self._texts.hexdigest())
        self._clear()

    def _store(self, tables: Sequence[pa.Table], texts: str) -> None:
        self._finished(self._work.add(tables, texts))

    def finish(self) -> None:
        """Store the last part, and wait for it."""
        self.flush()
        self._wait()

    def _wait(self) -> None:
        """Wait for the part that is being written. Raises what went wrong."""
        if self._written is not None:
            interruptible(self._written)
        self._written, self._being_written = None, ()

    def earlier(self, numbers: Numbers) -> pa.Table:
        """What was computed for earlier rows, by their sorted numbers."""
        sources = [(part.first, partial(self._work.table, part)) for part in self._work.parts if part.rows]
        tables = [table for table in (*self._being_written, *self._tables) if table.num_rows]
        sources += [(table[INDEX][0].as_py(), partial(_same, table)) for table in tables]
        sources.sort(key=itemgetter(0))
        owners = np.searchsorted([first for first, _ in sources], numbers, side="right") - 1
        found: list[pa.Table] = []
        for owner in np.unique(owners):
            table = sources[owner][1]()
            at = np.searchsorted(table[INDEX].to_numpy(), numbers[owners == owner])
            found.append(table.select(self._computed).take(pa.array(at)))
        return pa.concat_tables(found)


def _goes_with(first: pa.Schema, second: pa.Schema) -> bool:
    """Whether columns of the same name hold the same kind of values."""
    common = [(first.field(name), second.field(name)) for name in second.names if name in first.names]
    return all(one.type == other.type and is_json(one) == is_json(other) for one, other in common)


def _same(table: pa.Table) -> pa.Table:
    return table
