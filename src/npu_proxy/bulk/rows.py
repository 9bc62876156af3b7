"""Between rows and the engine: which texts are new, and from the results the columns of each row."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from npu_proxy.bulk.columns import CHUNKS, Columns, joined, split
from npu_proxy.bulk.duplicates import DigestIndex, Digests, Numbers, digests, first_of, hexadecimal, occurrences
from npu_proxy.bulk.readers import Block
from npu_proxy.bulk.texts import TextSource, column_values
from npu_proxy.bulk.writers import PLACE
from npu_proxy.errors import InputError, JobError
from npu_proxy.types import EmbedResult, TextInput

INDEX_BYTES = 1_000_000_000
"""Most memory for the digests of texts (24 million of them), and as much for counts of those that occur again."""
_PAUSES = (1.0, 5.0, 20.0)
"""Seconds before texts that failed through no fault of their own are tried again."""
Flags = npt.NDArray[np.bool_]
_SEEN = -2
"""Stands for the number of a row that was not computed."""
PREVIOUS = 1 << 62
"""Rows of an earlier output are numbered from here on."""
INDEX, ROW_ID, HASH, ERROR = "index", "row_id", "hash", "error"
"""Columns of every row: its number among all inputs, its id, the digest of its text, and why it failed."""


class Compute(Protocol):
    """Computes texts: yields results in order, each for as many texts as it likes."""

    def __call__(self, texts: Iterable[TextInput], /) -> Iterator[EmbedResult]: ...


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """What becomes of rows: their text, what is computed, which columns of the input are kept (None: all), and their ids.

    id_field: a column; None makes an id of the file's name, the text, and how often it occurred before. hash_rows: make `hash` of
    the whole row instead of its text. A row per chunk has the chunk's text; the whole one is only kept if ``keep`` names it.
    """

    text: TextSource
    columns: Columns
    keep: Sequence[str] | None = None
    id_field: str | None = None
    hash_rows: bool = False

    def needed(self) -> Sequence[str] | None:
        """The columns to read; None for all."""
        if self.keep is None:
            return None
        return list(dict.fromkeys((*self.keep, *self.text.fields(), *filter(None, [self.id_field]))))

    def kept(self, present: Sequence[str]) -> Sequence[str]:
        """The columns of a block that the output has."""
        if self.keep is None:
            left_out = self.text.fields() if CHUNKS in self.columns.schema.names else ()
            return [name for name in present if name not in left_out or name == self.id_field]
        wanted = dict.fromkeys((*filter(None, [self.id_field]), *self.keep))
        return [name for name in wanted if name in present]

    def computed(self) -> Sequence[str]:
        """The names of the columns that are computed."""
        return [*self.columns.schema.names, ERROR]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a block that the job has to write, and where each one's columns come from.

    numbers: of the rows among those of all inputs. keys: digests of all texts of the block, also those that need not be written.
    order: for each row a position in what is new, then what earlier rows have, then the errors. earlier: row numbers.
    """

    block: Block
    numbers: Numbers
    keys: Digests
    ids: Sequence[str] | None
    hashes: Sequence[str | None]
    new: Sequence[TextInput]
    earlier: Numbers
    errors: Sequence[str]
    order: Numbers


Unchanged = Callable[[Sequence[str], Sequence[str]], Flags]
"""Which rows need not be written, by their ids and hashes."""


class Pipeline:
    """Between rows and the engine: ``texts`` is what to compute, ``take`` receives it, ``done`` gets the finished blocks."""

    def __init__(
        self,
        options: RowOptions,
        done: Callable[[pa.Table, Rows], None],
        earlier: Callable[[Numbers], pa.Table] | None,
        unchanged: Unchanged | None = None,
    ) -> None:
        """earlier: looks up finished rows; None computes a text again in every block."""
        self._options = options
        self._done = done
        self._earlier = earlier
        self._unchanged = unchanged
        self._index = DigestIndex(INDEX_BYTES) if earlier else None
        self._counts = DigestIndex(INDEX_BYTES) if earlier and not options.id_field else None
        self._ids = DigestIndex(INDEX_BYTES) if options.id_field else None
        self._waiting: deque[Rows] = deque()
        self._texts: deque[TextInput] = deque()
        self._results: list[EmbedResult] = []
        self._count = 0

    def know(self, keys: Digests, numbers: Numbers) -> None:
        """Texts that need not be computed; ``earlier`` finds what they have by these numbers."""
        if self._index is not None:
            self._index.put(keys, numbers)

    def texts(self, blocks: Iterable[Block]) -> Iterator[TextInput]:
        """The texts to compute, each once as far as that is known."""
        for block in blocks:
            yield from self.take_block(block)

    def take_block(self, block: Block) -> Sequence[TextInput]:
        """Receive the next block; returns the texts of it that are to be computed."""
        rows = self.prepare(block)
        self._waiting.append(rows)
        self._texts.extend(rows.new)
        self._finish()
        return rows.new

    def take(self, result: EmbedResult, again: Compute) -> None:
        """Receive the next texts' results. again: computes those that failed through no fault of their own."""
        texts = list(itertools.islice(self._texts, self._count, self._count + len(result.errors)))
        self._results.append(_persistent(texts, result, again))
        self._count += len(texts)
        self._finish()

    def end(self) -> None:
        """Finish the blocks that had nothing new. Raises JobError if results are missing."""
        self._finish()
        if self._waiting:
            raise JobError("the engine returned fewer results than there were texts; this is a bug in npu-proxy, please report it")

    def prepare(self, block: Block) -> Rows:
        """Find out which texts of a block are new. Raises InputError if ids cannot be made."""
        self._check_ids(block)
        texts = self._options.text.texts(block)
        keys = digests(map(str, texts))
        good = np.array([not isinstance(text, InputError) for text in texts], np.bool_)
        known = self._index.find(keys) if self._index is not None else np.full(len(texts), -1, np.int64)
        known[~good] = -1
        occurred = (known == _SEEN) | ((known >= 0) & (known < PREVIOUS))
        ids = self._make_ids(block, keys, good, ~good | occurred | (first_of(keys, good) != np.arange(len(texts))))
        hashes = self._hashes(block, keys, good)
        write = ~(good & self._are_unchanged(block, ids, hashes))

        wanted = good & write
        is_first = wanted & (first_of(keys, wanted) == np.arange(len(texts)))
        is_new = is_first & (known < 0)
        self._remember(keys, good & ~write & (known == -1), is_first & ((known < 0) | (known >= PREVIOUS)), block.first)
        earlier = np.unique(known[wanted & (known >= 0)])
        order = np.zeros(len(texts), np.int64)
        order[is_new] = np.arange(int(is_new.sum()))
        order = order[first_of(keys, wanted)]
        from_earlier = wanted & (known >= 0)
        order[from_earlier] = int(is_new.sum()) + np.searchsorted(earlier, known[from_earlier])
        order[~good] = int(is_new.sum()) + len(earlier) + np.arange(int((~good).sum()))
        rows = np.flatnonzero(write)
        return Rows(
            block=block.take(rows.tolist()),
            numbers=rows + block.first,
            keys=keys,
            ids=ids if ids is None else [ids[row] for row in rows.tolist()],
            hashes=[hashes[row] for row in rows.tolist()],
            new=[text for text, new in zip(texts, is_new, strict=True) if new and not isinstance(text, InputError)],
            earlier=earlier,
            errors=[str(text) for text in texts if isinstance(text, InputError)],
            order=order[rows],
        )

    def _remember(self, keys: Digests, seen: Flags, computed: Flags, first: int) -> None:
        """Note texts that have occurred, and the rows at which they are computed. Raises InputError if ids need more than fits."""
        if self._index is None:
            return
        fits = True
        for rows, numbers in ((seen, np.full(len(keys), _SEEN)), (computed, np.arange(len(keys)) + first)):
            distinct = rows & (first_of(keys, rows) == np.arange(len(keys)))
            fits = self._index.put(keys[distinct], numbers[distinct]) and fits
        if not fits and self._counts is not None:
            message = "there are more different texts than ids can be made for; name a column of ids with --id-field"
            raise InputError(message, param="id_field")

    def _check_ids(self, block: Block) -> None:
        """Raise InputError if a row has no id, or that of a row before it; once the index is full, of a row of this block."""
        if self._ids is None or not len(block):
            return
        name = self._options.id_field or ""
        ids = list(column_values(block.table, name))
        for row, value in enumerate(ids):
            if not isinstance(value, str | int):
                raise InputError(
                    f"{block.place(row)}: the row has no id in field `{name}` (a text or an integer)", param="id_field"
                )
        keys = digests(map(str, ids))
        again = (first_of(keys, np.ones(len(ids), np.bool_)) != np.arange(len(ids))) | (self._ids.find(keys) >= 0)
        if again.any():
            row = int(np.argmax(again))
            message = f"{block.place(row)}: the id {ids[row]!r} in field `{name}` has occurred before"
            raise InputError(f"{message}; ids must be unique", param="id_field")
        self._ids.put(keys, np.zeros(len(keys), np.int64))

    def _are_unchanged(self, block: Block, ids: Sequence[str] | None, hashes: Sequence[str | None]) -> Flags:
        if self._unchanged is None:
            return np.zeros(len(block), np.bool_)
        own = ids or [str(value) for value in column_values(block.table, self._options.id_field or "")]
        return self._unchanged(own, [text or "" for text in hashes])

    def _hashes(self, block: Block, keys: Digests, good: Flags) -> Sequence[str | None]:
        names = hexadecimal(keys)
        if self._options.hash_rows:
            columns = [block.table[name].to_pylist() for name in self._options.kept(block.table.schema.names)]
            rows = zip(names, *columns, strict=True)
            names = hexadecimal(digests(msgspec.json.encode(row, enc_hook=str).decode() for row in rows))
        return [name if is_good else None for name, is_good in zip(names, good, strict=True)]

    def _make_ids(self, block: Block, keys: Digests, good: Flags, again: Flags) -> Sequence[str] | None:
        """An id per row: of the file's name, the text, and how often it has occurred before. again: rows of texts that have."""
        if self._counts is None:
            return None
        named = keys ^ digests([Path(block.file).name])
        if again.any():
            counts = occurrences(self._counts, keys[again], good[again].astype(np.int64))
            if counts is None:
                raise InputError("too many texts occur again to make ids; name a column of ids with --id-field", param="id_field")
            names = hexadecimal(named[again])
            named[again] = digests(f"{name} {count}" if count else name for name, count in zip(names, counts, strict=True))
        return hexadecimal(named)

    def _finish(self) -> None:
        while self._waiting and len(self._waiting[0].new) <= self._count:
            rows = self._waiting.popleft()
            count = len(rows.new)
            merged, self._results = (joined(self._results), []) if count else (None, self._results)
            if merged is not None and len(merged.errors) > count:
                merged, rest = split(merged, count)
                self._results = [rest]
            for _ in range(count):
                self._texts.popleft()
            self._count -= count
            self._done(self._assembled(rows, _with_errors(self._options.columns, rows.new, merged)), rows)

    def _assembled(self, rows: Rows, computed: pa.Table) -> pa.Table:
        parts = [computed]
        if len(rows.earlier):
            assert self._earlier is not None
            parts.append(self._earlier(rows.earlier).select(computed.schema.names))
        if rows.errors:
            parts.append(_failed_rows(computed.schema, rows.errors))
        table = computed
        if len(parts) > 1 or len(rows.order) != computed.num_rows:
            table = pa.concat_tables(parts).combine_chunks().take(pa.array(rows.order))
        return _with_input(self._options, rows, table)


def _persistent(texts: Sequence[TextInput], result: EmbedResult, again: Compute) -> EmbedResult:
    """The result, without errors that are not the texts' own: those texts are tried again. Raises JobError in the end."""
    for pause in _PAUSES:
        blameless = next((error for error in result.errors if error is not None and not isinstance(error, InputError)), None)
        if blameless is None:
            return result
        time.sleep(pause)
        (result,) = again(texts)
    blameless = next((error for error in result.errors if error is not None and not isinstance(error, InputError)), None)
    if blameless is not None:
        raise JobError(f"{blameless}; tried {len(_PAUSES) + 1} times") from blameless
    return result


def _with_errors(columns: Columns, texts: Sequence[TextInput], result: EmbedResult | None) -> pa.Table:
    if result is None:
        table = columns.schema.empty_table()
        return table.append_column(ERROR, pa.array([], pa.string()))
    errors = [error and str(error) for error in result.errors]
    return columns.table(texts, result).append_column(ERROR, pa.array(errors, pa.string()))


def _failed_rows(schema: pa.Schema, errors: Sequence[str]) -> pa.Table:
    columns = [pa.array(errors, pa.string()) if field.name == ERROR else pa.nulls(len(errors), field.type) for field in schema]
    return pa.table(columns, schema=schema)


def _with_input(options: RowOptions, rows: Rows, computed: pa.Table) -> pa.Table:
    """The columns of the input, what was computed, and where rows with errors stand."""
    block = rows.block
    columns: dict[str, Any] = {INDEX: pa.array(rows.numbers)}
    fields = [pa.field(INDEX, pa.int64())]
    if rows.ids is not None:
        columns[ROW_ID] = pa.array(rows.ids, pa.string())
        fields.append(pa.field(ROW_ID, pa.string()))
    own = {INDEX, ROW_ID, HASH, PLACE, *computed.schema.names, *_chunk_names(options.columns)}
    for name in options.kept(block.table.schema.names):
        if name in own:
            others = ", ".join(other for other in block.table.schema.names if other not in own)
            message = f"`{block.file}` has a column `{name}`, and so has the output; choose the columns to keep: --columns {others}"
            raise InputError(message, param="columns")
        columns[name] = _without_dictionary(block.table[name])
        fields.append(block.table.schema.field(name).with_type(columns[name].type))
    for name in computed.schema.names:
        columns[name] = computed[name]
        fields.append(computed.schema.field(name))
    columns[PLACE] = _places(block, computed[ERROR])
    columns[HASH] = pa.array(rows.hashes, pa.string())
    fields += [pa.field(PLACE, pa.string()), pa.field(HASH, pa.string())]
    return pa.table(list(columns.values()), schema=pa.schema(fields))


def _chunk_names(columns: Columns) -> Sequence[str]:
    if CHUNKS not in columns.schema.names:
        return ()
    return ["chunk", *(field.name for field in columns.schema.field(CHUNKS).type.value_type)]


def _places(block: Block, errors: pa.ChunkedArray) -> pa.Array:
    if errors.null_count == len(errors):
        return pa.nulls(len(errors), pa.string())
    return pa.array([block.place(row) if error else None for row, error in enumerate(errors.to_pylist())], pa.string())


def _without_dictionary(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
