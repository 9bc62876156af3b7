"""Deliver the parts of a job to a database, and delete there what is gone from the input."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from npu_proxy.bulk.arrow import compute
from npu_proxy.bulk.columns import CHUNKS
from npu_proxy.bulk.duplicates import DigestIndex, digests, first_of_each
from npu_proxy.bulk.rows import ERROR, INDEX_BYTES
from npu_proxy.bulk.sinks.base import Place, Sink
from npu_proxy.bulk.work_folder import Part, Start, WorkFolder
from npu_proxy.bulk.writers import OutputSchema, output_tables
from npu_proxy.errors import InputError, JobError, NpuProxyError

CHUNK_KEY = "chunk_id"
"""The key of a row per chunk: the key of its text, a colon, and its number."""


class Delivery:
    """Sends parts to a sink, each as soon as it is stored. After a kill, parts are sent again; their rows replace themselves."""

    def __init__(self, work: WorkFolder, sink: Sink, place: Place, schema: OutputSchema, base_key: str) -> None:
        """base_key: the column that identifies texts; another one than the place's key if rows are chunks."""
        self._work = work
        self._sink = sink
        self._place = place
        self._make_schema = schema
        self._schema: pa.Schema | None = None
        self._base_key = base_key
        self._unchanged = DigestIndex(INDEX_BYTES)
        self._known: DigestIndex | None = None

    def add(self, part: Part) -> None:
        """Send a part, unless that was done before. Raises JobError if the database refuses it."""
        if self._work.parts.index(part) < self._work.delivered:
            return
        for rows in self._rows(part):
            if rows.num_rows:
                with _errors_of(self._place):
                    self._sink.upsert(rows)
        self._work.deliver(self._work.parts.index(part) + 1)

    def remember(self) -> None:
        """Read which rows the database has, so that ``unchanged`` can tell."""
        self._known = DigestIndex(INDEX_BYTES)
        with _errors_of(self._place):
            for table in self._sink.known():
                names = [self._base(str(key)) for key in table[self._place.key].to_pylist()]
                keys = digests(f"{name} {text}" for name, text in zip(names, table["hash"].to_pylist(), strict=True))
                distinct = np.unique(first_of_each(keys))
                if not self._known.put(keys[distinct], np.zeros(len(distinct), np.int64)):
                    raise JobError(f"`{self._place.location}` has more rows than can be compared; use --overwrite")

    def unchanged(self, keys: Sequence[str], hashes: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Which rows the database has already, by their keys and hashes."""
        if self._known is None:
            return np.zeros(len(keys), np.bool_)
        found = self._known.find(digests(f"{key} {text}" for key, text in zip(keys, hashes, strict=True))) >= 0
        if found.any():
            same = digests(key for key, is_same in zip(keys, found, strict=True) if is_same)
            distinct = np.unique(first_of_each(same))
            self._unchanged.put(same[distinct], np.zeros(len(distinct), np.int64))
        return found

    def delete_gone(self) -> int:
        """Delete rows that are no longer in the input; returns how many."""
        delivered = DigestIndex(INDEX_BYTES)
        for part in self._work.parts:
            for rows in self._rows(part):
                keys = digests(map(str, rows[self._place.key].to_pylist()))
                distinct = np.unique(first_of_each(keys))
                delivered.put(keys[distinct], np.zeros(len(distinct), np.int64))
        gone: list[Any] = []
        with _errors_of(self._place):
            for table in self._sink.known():
                names: list[Any] = table[self._place.key].to_pylist()
                there = delivered.find(digests(map(str, names))) >= 0
                there |= self._unchanged.find(digests(self._base(str(name)) for name in names)) >= 0
                gone += [name for name, is_there in zip(names, there, strict=True) if not is_there]
            if gone:
                self._sink.delete(gone)
        return len(gone)

    def _base(self, key: str) -> str:
        return key.rsplit(":", 1)[0] if self._place.key == CHUNK_KEY else key

    def _rows(self, part: Part) -> Iterator[pa.Table]:
        """The rows of a part as the database has them: with types, without those that failed."""
        table = self._work.read(part)
        if self._schema is None:
            self._schema = self._make_schema.of([self._work.read(self._work.parts[0])])
        if not self._make_schema.holds(self._schema, table):
            raise InputError(_what_changed(self._schema, self._make_schema.of([table]), part.first), param="columns")
        for rows in output_tables([table], self._schema, skip_failed=True):
            yield self._with_key(rows.drop_columns([ERROR]))

    def _with_key(self, rows: pa.Table) -> pa.Table:
        if self._place.key != CHUNK_KEY:
            return rows
        texts = compute.cast(rows[self._base_key], pa.string())
        keys = compute.binary_join_element_wise(texts, compute.cast(rows["chunk"], pa.string()), ":")
        return rows.append_column(CHUNK_KEY, keys)


def _what_changed(schema: pa.Schema, other: pa.Schema, row: int) -> str:
    name = next(
        (field.name for field in other if field.name not in schema.names or schema.field(field.name).type != field.type), "?"
    )
    where = f"from row {row} on (counted from 0)"
    return f"column `{name}` is new or of another type {where}; a table has one type per column: choose columns with --columns"


@contextmanager
def _errors_of(place: Place) -> Generator[None]:
    """Convert the errors of a database to a JobError."""
    try:
        yield
    except NpuProxyError:
        raise
    except Exception as error:  # each database has errors of its own
        what = " ".join(str(error).split())[:300]
        raise JobError(f"`{place.location}`: {type(error).__name__}: {what}") from error


def key_of(id_column: str, computed: Sequence[str]) -> str:
    """The column that identifies rows in a database: a text's id, or a chunk's."""
    return CHUNK_KEY if CHUNKS in computed else id_column


def check_table(sink: Sink, place: Place, start: Start) -> None:
    """Make room for a job: drop the table to begin again. Raises InputError if it would mix vectors, or surprise the user."""
    found = sink.metadata()
    if found is None:
        return
    if start == "overwrite":
        sink.drop()
        return
    table = f"table `{place.table}` of `{place.location}`"
    if start != "update":
        raise InputError(f"{table} exists; bring it up to date with --update, or replace it with --overwrite", param="output")
    for name, value in place.metadata.items():
        if found.get(name) != value:
            message = f"{table} was made with {name}={found.get(name)}, and now it is {value}; compute all of it with --overwrite"
            raise InputError(message, param=name)
