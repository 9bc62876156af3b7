"""Read rows from files, in blocks. Each format is one function and one row of a table. All commands use this module.

Tables are read by pyarrow. JSON is decoded by msgspec and CSV by Python's csv module in strict mode, because pyarrow's readers
change values in silence (docs/adr/0019).
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from npu_proxy.bulk.arrow import JSON, no_columns
from npu_proxy.bulk.files import InputFile, OpenFile, open_input
from npu_proxy.errors import InputError

BLOCK_ROWS = 4096
_CHUNK = 1 << 22
"""Bytes that are read at a time."""
_LONGEST = 1 << 26
"""Bytes that a line, a JSON object or a CSV field may have."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTE_ORDER_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive rows of one file.

    first: number of the first row among those of all inputs, from 0. places: line (or row) of each row in its file, from 1.
    errors: what is wrong with rows that could not be read; their columns are null.
    """

    file: str
    unit: str
    places: Sequence[int]
    table: pa.Table
    errors: Mapping[int, str] = field(default_factory=dict[int, str])
    first: int = 0

    def place(self, row: int) -> str:
        """Where a row of this block stands, in the user's terms."""
        return f"`{self.file}` {self.unit} {self.places[row]}"

    def head(self, rows: int) -> Block:
        """The first rows of this block."""
        return self if rows >= len(self) else replace(self, places=self.places[:rows], table=self.table.slice(0, rows))

    def take(self, rows: Sequence[int]) -> Block:
        """Some rows of this block, by their ascending positions; ``first`` stays that of the whole block."""
        if len(rows) == len(self):
            return self
        errors = {new: self.errors[old] for new, old in enumerate(rows) if old in self.errors}
        table = self.table.take(pa.array(rows, pa.int64())) if self.table.num_columns else no_columns(len(rows))
        return replace(self, places=[self.places[row] for row in rows], table=table, errors=errors)

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """columns: those that are needed, None for all. delimiter: between the fields of csv and tsv; None for the format's own."""

    columns: Sequence[str] | None = None
    delimiter: str | None = None


class Inputs:
    """The rows of several files, as blocks. ``fraction`` is the share of all bytes that has been read."""

    def __init__(self, files: Sequence[InputFile], options: ReadOptions) -> None:
        self._files = files
        self._options = options
        self._before = 0
        self._open: OpenFile | None = None

    def __iter__(self) -> Generator[Block]:
        """Blocks of up to 4,096 rows, in order; one without rows tells which columns a table has.

        Raises InputError for what makes the rest of a file unreadable.
        """
        first = 0
        for file in self._files:
            with open_input(file) as opened:
                self._open = opened
                try:
                    for block in READERS[file.format](opened, self._options):
                        yield replace(block, first=first)
                        first += len(block)
                finally:
                    self._open = None
            self._before += file.size

    def fraction(self) -> float | None:
        """The share of all bytes that has been read, from 0 to 1; None if the size of an input is not known."""
        if not all(file.size for file in self._files):
            return None
        now = self._open.done() * self._open.file.size if self._open else 0.0
        return (self._before + now) / sum(file.size for file in self._files)


# -- lines ---------------------------------------------------------------------------------------------------------------


def _chunks(opened: OpenFile) -> Iterator[bytes]:
    """The bytes of a file without a byte order mark."""
    start = opened.stream.read(_CHUNK)
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            convert = f"iconv -f {encoding} -t utf-8 {opened.file.name}"
            raise InputError(f"`{opened.file.name}` is {encoding.upper()}; convert it: {convert}", param="input")
    chunk: bytes = start.removeprefix(codecs.BOM_UTF8)
    while chunk:
        yield chunk
        chunk = opened.stream.read(_CHUNK)


def _lines(opened: OpenFile) -> Iterator[bytes]:
    r"""Lines without their ends: \n or \r\n, and \r in a file that has no \n among its first bytes. Nothing else ends a line."""
    rest, end = b"", b""
    for chunk in _chunks(opened):
        end = end or (b"\r" if b"\n" not in chunk and b"\r" in chunk else b"\n")
        *lines, rest = (rest + chunk).split(end)
        for line in lines:
            yield line.removesuffix(b"\r")
        if len(rest) > _LONGEST:
            raise InputError(f"`{opened.file.name}` has a line of more than {_LONGEST >> 20} MB", param="input")
    if rest:
        yield rest.removesuffix(b"\r")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8: {error.reason} at byte {error.start}; if it is Latin-1, convert the file: iconv -f latin1 -t utf-8"


def _txt(opened: OpenFile, options: ReadOptions) -> Iterator[Block]:
    """One text per line, in a column `text`. A blank line is a row with an empty text."""
    _check_columns(opened.file.name, ["text"], options.columns)
    for places, lines in _groups(enumerate(_lines(opened), 1)):
        texts: list[str | None] = []
        errors: dict[int, str] = {}
        for row, line in enumerate(lines):
            try:
                texts.append(line.decode())
            except UnicodeDecodeError as error:
                texts.append(None)
                errors[row] = _not_utf8(error)
        yield Block(
            file=opened.file.name, unit="line", places=places, table=pa.table({"text": pa.array(texts, pa.string())}), errors=errors
        )


# -- json ----------------------------------------------------------------------------------------------------------------

_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_decode_fields, _decode_lines = _decoder.decode, _decoder.decode_lines
Fields = Mapping[str, str]
"""The fields of a JSON object, each as JSON text."""


def _jsonl(opened: OpenFile, options: ReadOptions) -> Iterator[Block]:
    """One JSON object per line. Blank lines are no rows."""
    lines = ((number, line) for number, line in enumerate(_lines(opened), 1) if line and not line.isspace())
    return _json_blocks(opened, "line", lines, options)


def _json(opened: OpenFile, options: ReadOptions) -> Iterator[Block]:
    """One array of JSON objects; or an object per line, which many files of this name are."""
    chunks = _chunks(opened)
    first = next(chunks, b"")
    chunks = itertools.chain([first], chunks)
    if first.lstrip()[:1] == b"{":
        stream = io.BufferedReader(_ChunkStream(chunks))  # type: ignore[arg-type]
        return _jsonl(OpenFile(file=opened.file, stream=stream, done=opened.done), options)
    return _json_blocks(opened, "item", _ArrayItems(opened.file.name, chunks), options)


class _ChunkStream(io.RawIOBase):
    """Bytes that were read already, and the rest of them, as a stream."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or next(self._chunks, b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


class _ArrayItems:
    """The items of one JSON array as JSON text, numbered from 1; only one of them is in memory at a time."""

    def __init__(self, name: str, chunks: Iterator[bytes]) -> None:
        self._name = name
        decode = codecs.getincrementaldecoder("utf-8")()
        self._parts = itertools.chain(map(decode.decode, chunks), (decode.decode(b"", final=True) for _ in range(1)))
        self._text = ""
        # Numbers are not converted: only the end of an item matters here.
        self._scan = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        try:
            yield from self._items()
        except UnicodeDecodeError as error:
            raise InputError(f"`{self._name}` {_not_utf8(error)}", param="input") from error

    def _items(self) -> Iterator[tuple[int, bytes]]:
        name = self._name
        if self._next() != "[":
            raise InputError(f"`{name}` is neither a JSON array nor a JSON object per line", param="input")
        number, following = 0, "," if self._peek() != "]" else self._next()
        while following == ",":
            number += 1
            self._peek()
            stop = self._end_of_item(number)
            yield number, self._text[:stop].encode("utf-8", "surrogatepass")
            self._text = self._text[stop:]
            following = self._next()
        if following != "]":
            raise InputError(f"`{name}`: after item {number}, a comma or ] is missing; is the file cut short?", param="input")
        if self._peek():
            raise InputError(f"`{name}` has something after its array of {number} items", param="input")

    def _end_of_item(self, number: int) -> int:
        while True:
            try:
                return self._scan(self._text)[1]
            except (ValueError, RecursionError) as error:
                if isinstance(error, ValueError) and len(self._text) < _LONGEST and self._more():
                    continue
                why = error.msg if isinstance(error, json.JSONDecodeError) else "it is nested too deeply"
                raise InputError(f"`{self._name}` item {number} is not valid JSON: {why}", param="input") from error

    def _more(self) -> bool:
        added = next((part for part in self._parts if part), "")
        self._text += added
        return bool(added)

    def _peek(self) -> str:
        """The next character that is no space; empty at the end."""
        self._text = self._text.lstrip()
        while not self._text and self._more():
            self._text = self._text.lstrip()
        return self._text[:1]

    def _next(self) -> str:
        character = self._peek()
        self._text = self._text[1:]
        return character


def _json_blocks(opened: OpenFile, unit: str, items: Iterable[tuple[int, bytes]], options: ReadOptions) -> Iterator[Block]:
    for places, texts in _groups(items):
        rows, errors = _whole_rows(texts, options.columns), {}
        if rows is None:
            rows, errors = _single_rows(texts, options.columns)
        names = dict.fromkeys(itertools.chain.from_iterable(rows))
        columns = [pa.array([row.get(name) for row in rows], pa.string()) for name in names]
        schema = pa.schema([pa.field(name, pa.string(), metadata=JSON) for name in names])
        table = pa.table(columns, schema=schema) if names else no_columns(len(rows))
        yield Block(file=opened.file.name, unit=unit, places=places, table=table, errors=errors)


def _whole_rows(texts: Sequence[bytes], wanted: Sequence[str] | None) -> Sequence[Fields] | None:
    """The fields of JSON objects, decoded in one call; None if anything is unusual about one of them."""
    lines = b"\n".join(texts)
    if any(lines.count(f'"{name}"'.encode()) > len(texts) for name in wanted or ()):
        return None
    try:
        lines.decode()
        rows = _decode_lines(lines)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return None
    if len(rows) != len(texts):
        return None
    names = None if wanted is None else {root for name in wanted for root in (name, name.split(".")[0])}
    return [{name: str(value, "utf-8") for name, value in row.items() if names is None or name in names} for row in rows]


def _single_rows(texts: Sequence[bytes], wanted: Sequence[str] | None) -> tuple[Sequence[Fields], dict[int, str]]:
    """The fields of JSON objects, and what is wrong with those that have none."""
    rows: list[Fields] = []
    errors: dict[int, str] = {}
    for row, text in enumerate(texts):
        try:
            rows.append(_fields(text, wanted))
        except ValueError as error:
            rows.append({})
            errors[row] = str(error)
    return rows, errors


def _fields(text: bytes, wanted: Sequence[str] | None) -> Fields:
    """The fields of a JSON object. Raises ValueError with what is wrong."""
    try:
        text.decode()
        fields = _decode_fields(text)
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from error
    except msgspec.ValidationError:
        raise ValueError("is not a JSON object, so it has no fields") from None
    except (msgspec.DecodeError, RecursionError) as strict:
        return _lenient_fields(text, strict)
    roots = fields if wanted is None else [name if name in fields else name.split(".")[0] for name in wanted]
    names = [name for name in roots if name in fields]
    for name in names if wanted is not None else ():
        if text.count(f'"{name}"'.encode()) > 1:
            _check_repeated(text, name)
    return {name: str(fields[name], "utf-8") for name in names}  # type: ignore[call-overload]  # Raw is a buffer


def _lenient_fields(text: bytes, strict: Exception) -> Fields:
    """Like Python's json module: NaN and infinities are null, half of a surrogate pair is U+FFFD."""
    try:
        found = json.loads(text, parse_constant=lambda _: None, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError:
        raise ValueError("is nested too deeply") from strict
    return {name: _LONE_SURROGATE.sub("\ufffd", json.dumps(value, ensure_ascii=False)) for name, value in found.items()}


def _integer(digits: str) -> int:
    if len(digits) > sys.int_info.default_max_str_digits:
        raise ValueError(f"has a number of {len(digits)} digits")
    return int(digits)


def _check_repeated(text: bytes, name: str) -> None:
    pairs: Any = json.loads(text, object_pairs_hook=list, parse_int=str)
    if sum(key == name for key, _ in pairs) > 1:
        raise ValueError(f"has the field `{name}` twice")


# -- csv -----------------------------------------------------------------------------------------------------------------


def _csv_with(delimiter: str) -> Callable[[OpenFile, ReadOptions], Iterator[Block]]:
    def read(opened: OpenFile, options: ReadOptions) -> Iterator[Block]:
        csv.field_size_limit(_LONGEST)
        name = opened.file.name
        stream = io.TextIOWrapper(
            io.BufferedReader(_ChunkStream(_chunks(opened)), _CHUNK),  # type: ignore[arg-type]
            encoding="utf-8",
            errors="surrogateescape",
            newline="",
        )
        reader = csv.reader(stream, strict=True, delimiter=options.delimiter or delimiter)
        rows = _csv_rows(name, reader)
        _, header = next(rows, (0, []))
        if isinstance(header, str) or not header or _wrong_row(header, len(header)):
            raise InputError(f"`{name}` has no header line, in UTF-8, with the names of its columns", param="input")
        _check_columns(name, header, options.columns)
        wanted = range(len(header)) if options.columns is None else [header.index(column) for column in options.columns]
        schema = pa.schema([pa.field(header[index], pa.string()) for index in wanted])
        yield _no_rows(name, "line", schema)
        for places, read_rows in _groups(rows):
            errors: dict[int, str] = {}
            kept: list[list[str] | None] = []
            for row, fields in enumerate(read_rows):
                wrong = fields if isinstance(fields, str) else _wrong_row(fields, len(header))
                kept.append(None if wrong else fields)  # type: ignore[arg-type]
                if wrong:
                    errors[row] = wrong
            columns = [pa.array([fields and fields[index] for fields in kept], pa.string()) for index in wanted]
            table = pa.table(columns, schema=schema) if columns else no_columns(len(kept))
            yield Block(file=name, unit="line", places=places, table=table, errors=errors)

    return read


def _csv_rows(name: str, reader: Any) -> Iterator[tuple[int, list[str] | str]]:
    """Rows and the lines in which they begin; a line that is no row is the message. Blank lines are no rows."""
    while True:
        start = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            lines = f"line {start}" if reader.line_num <= start else f"lines {start} to {reader.line_num}"
            if reader.line_num > start or "end of data" in str(error):
                cure = f'a quote that opens in line {start} is not closed; a quote inside of a quoted field is written ""'
                raise InputError(f"`{name}` {lines} cannot be read as CSV: {error}. Probably {cure}", param="input") from error
            yield start, f'is not valid CSV: {error}; a quote inside of a quoted field is written ""'
            continue
        if fields is None:
            return
        if fields:
            yield start, fields


def _wrong_row(fields: Sequence[str], width: int) -> str:
    if len(fields) != width:
        return f"has {len(fields)} fields, but the header has {width}; put fields that contain the delimiter in quotes"
    if any(_LONE_SURROGATE.search(value) for value in fields if not value.isascii()):
        return "is not UTF-8; if it is Latin-1, convert the file: iconv -f latin1 -t utf-8"
    return ""


# -- tables --------------------------------------------------------------------------------------------------------------


def _parquet(opened: OpenFile, options: ReadOptions) -> Iterator[Block]:
    with pq.ParquetFile(opened.stream) as file:
        total = max(1, file.metadata.num_rows)
        schema = file.schema_arrow
        wanted = _check_columns(opened.file.name, schema.names, options.columns)
        roots = None if wanted is None else list(dict.fromkeys(wanted))
        # pyarrow takes the name `a.b` for a field of a struct as well as for a column, so a name with a dot means reading all.
        narrowed = None if roots is None or any("." in name for name in roots) else roots
        yield from _table_blocks(opened, schema, _row_groups(file, narrowed), roots, total)


def _row_groups(file: pq.ParquetFile, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    """Batches of a bounded size, by the mean size of each group's rows."""
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        rows = _rows_within(group.total_byte_size, group.num_rows)
        yield from file.iter_batches(rows, row_groups=[number], columns=columns)


def _arrow(opened: OpenFile, options: ReadOptions) -> Iterator[Block]:
    """Arrow's file format, which is also Feather's version 2, or its stream format."""
    name = opened.file.name
    start = opened.stream.read(8)
    opened.stream.seek(0)
    if start.startswith(b"FEA1"):
        raise InputError(f"`{name}` is Feather version 1; write it again with a current pandas or pyarrow", param="input")
    if start.startswith(b"ARROW1"):
        with pa.ipc.open_file(opened.stream) as file:
            wanted = _check_columns(name, file.schema.names, options.columns)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
            yield from _table_blocks(opened, file.schema, batches, wanted)
    else:
        with pa.ipc.open_stream(opened.stream) as file:
            wanted = _check_columns(name, file.schema.names, options.columns)
            yield from _table_blocks(opened, file.schema, file, wanted)


def _table_blocks(
    opened: OpenFile,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    wanted: Sequence[str] | None,
    total: int | None = None,
) -> Iterator[Block]:
    seen = 0
    yield _no_rows(
        opened.file.name, "row", pa.schema([schema.field(name) for name in schema.names if wanted is None or name in wanted])
    )
    if total is not None:
        opened.done = lambda: seen / total
    for batch in batches:
        table = pa.Table.from_batches([batch])
        table = table if wanted is None else table.select(wanted)
        rows = _rows_within(table.nbytes, batch.num_rows)
        for start in range(0, batch.num_rows, rows):
            count = min(rows, batch.num_rows - start)
            part = table.slice(start, count) if table.num_columns else no_columns(count)
            yield Block(file=opened.file.name, unit="row", places=range(seen + 1, seen + count + 1), table=part)
            seen += count


# -- shared --------------------------------------------------------------------------------------------------------------


def _rows_within(size: int, rows: int) -> int:
    """How many rows of a table of ``size`` bytes a block may have."""
    return max(1, min(BLOCK_ROWS, _CHUNK * rows // max(1, size)))


def _no_rows(name: str, unit: str, schema: pa.Schema) -> Block:
    """What a file without rows has all the same: columns."""
    return Block(file=name, unit=unit, places=(), table=schema.empty_table())


def _groups(items: Iterable[tuple[int, Any]]) -> Iterator[tuple[list[int], list[Any]]]:
    """Groups of places and of what stands there: as many as a block has."""
    iterator = iter(items)
    places: list[int] = []
    values: list[Any] = []
    size = 0
    for place, value in iterator:
        places.append(place)
        values.append(value)
        size += len(value)
        if len(places) == BLOCK_ROWS or size > _CHUNK:
            yield places, values
            places, values, size = [], [], 0
    if places:
        yield places, values


def _check_columns(name: str, present: Sequence[str], wanted: Sequence[str] | None) -> Sequence[str] | None:
    """The wanted columns as they are named in the file: `a.b` is column `a.b`, else field `b` of column `a`. Raises InputError."""
    for column in present if wanted is None else wanted:
        if present.count(column) > 1:
            raise InputError(f"`{name}` has {present.count(column)} columns of the name `{column}`; rename one", param="input")
    if wanted is None:
        return None
    roots: list[str] = []
    for column in wanted:
        root = column if column in present else column.split(".")[0]
        if root not in present:
            known = ", ".join(present[:20]) + ", ..." * (len(present) > 20)
            raise InputError(f"`{name}` has no column `{column}`; its columns: {known}. Set --text-field", param="text_field")
        roots.append(root)
    return list(dict.fromkeys(roots))


READERS: dict[str, Callable[[OpenFile, ReadOptions], Iterator[Block]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv_with(","),
    "tsv": _csv_with("\t"),
    "txt": _txt,
    "parquet": _parquet,
    "arrow": _arrow,
}
