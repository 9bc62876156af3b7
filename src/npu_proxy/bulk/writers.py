"""Write the finished parts of a job to a file. Each format is one function and one row of a table."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from npu_proxy.bulk.arrow import JSON, are_json_texts, compute, is_json, json_as_texts, json_values
from npu_proxy.bulk.columns import CHUNKS
from npu_proxy.bulk.indexes import check_index, vector_of, write_faiss, write_usearch
from npu_proxy.errors import InputError

_GROUP_ROWS = 16_384
_GROUP_BYTES = 64_000_000
"""A group of rows in an output has at most so many rows and, unless it is one row, about so many bytes."""
METADATA = b"npu_proxy"
PLACE = "place"
"""Where a row with an error stands; only for the file of errors."""

Tables = Iterable[pa.Table]


@dataclass(frozen=True, kw_only=True)
class Format:
    """write: writes tables of one schema to a file. typed: whether a column has one type, so that JSON values get one.

    check: raises InputError if the format cannot hold the columns, with vectors of a dtype. has_null: whether it can say that a row
    has no vector.
    """

    write: Callable[[Tables, pa.Schema, Path], None]
    typed: bool = True
    check: Callable[[pa.Schema, str], None] = lambda _, __: None
    has_null: Callable[[pa.Schema], bool] = lambda _: True


def format_of(path: Path) -> Format:
    """The format of an output by its suffix. Raises InputError if it is unknown."""
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise InputError(f"`{path}`: unknown file format; supported: {', '.join(FORMATS)}", param="output")
    return found


# -- from parts to rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputSchema:
    """Makes the schema of an output from parts: without what only parts have, with types for JSON values if the format has types.

    Their type is what all values of a column have in common. If that is nothing, the column is a string: texts as they are, other
    values as JSON. computed: names of the columns that are not the input's.
    """

    format: Format
    metadata: Mapping[str, Any]
    computed: Sequence[str]

    def of(self, parts: Tables) -> pa.Schema:
        """The schema of all parts together."""
        known: dict[str, pa.Field | None] = {}
        for part in parts:
            for field in part.schema:
                found = self._typed(part, field) if known.get(field.name, field) is not None else None
                before = known.get(field.name)
                known[field.name] = _unified(before, found) if before is not None and found is not None else found
        inner = (PLACE, CHUNKS) if self.format.typed else (PLACE, CHUNKS, "hash")
        text = None if self.format.typed else JSON
        fields = [field or pa.field(name, pa.string(), metadata=text) for name, field in known.items() if name not in inner]
        if known.get(CHUNKS) is not None:
            fields[_after_kept(fields) :] = _chunk_fields(known[CHUNKS]) + fields[_after_kept(fields) :]
        kept = [name for name in known if name not in (*self.computed, "index", "row_id", "hash", PLACE)]
        return pa.schema(fields, metadata={METADATA: msgspec.json.encode({**self.metadata, "kept": kept})})

    def holds(self, schema: pa.Schema, part: pa.Table) -> bool:
        """Whether a schema would be the same if the part were among those it was made of."""
        inner = (PLACE, CHUNKS) if self.format.typed else (PLACE, CHUNKS, "hash")
        for field in part.schema:
            if field.name in inner:
                continue
            if field.name not in schema.names:
                return False
            own = schema.field(field.name)
            if is_json(own) or pa.types.is_string(own.type):
                continue  # has values of any type
            found = self._typed(part, field)
            both = None if found is None else _unified(own, found)
            if both is None or both != own.remove_metadata():
                return False
        return True

    def _typed(self, part: pa.Table, field: pa.Field) -> pa.Field | None:
        """A column of a part with the type that its values have; None if they have none in common."""
        if not is_json(field):
            return field.remove_metadata()
        kind = _type_of(part[field.name]) if self.format.typed else None
        return None if kind is None else pa.field(field.name, kind)


def _unified(first: pa.Field, second: pa.Field) -> pa.Field | None:
    """A column that holds the values of both; None if there is none."""
    if first.type == second.type:
        return first.remove_metadata()
    schemas = [pa.schema([field.remove_metadata()]) for field in (first, second)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0)
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return None


def row_schema(computed: pa.Schema) -> pa.Schema:
    """The computed columns of a row: chunks become rows of their own."""
    fields = [_chunk_fields(field) if field.name == CHUNKS else [field] for field in computed]
    return pa.schema(itertools.chain.from_iterable(fields))


def _after_kept(fields: Sequence[pa.Field]) -> int:
    return next(number for number, field in enumerate(fields) if field.name == "tokens")


def _chunk_fields(chunks: pa.Field) -> list[pa.Field]:
    return [pa.field("chunk", pa.int32()), *chunks.type.value_type]


def output_tables(parts: Tables, schema: pa.Schema, *, skip_failed: bool) -> Iterator[pa.Table]:
    """The rows of the parts in the output's columns. Where tables end does not depend on the parts: equal rows make equal files."""
    waiting: list[pa.Table] = []
    rows = size = 0
    for part in parts:
        kept = part.filter(compute.is_null(part["error"])) if skip_failed else part
        table = _in_schema(_exploded(kept) if CHUNKS in kept.schema.names else kept, schema)
        sizes = np.cumsum(row_bytes(table))
        start = 0
        while start < table.num_rows:
            before = sizes[start - 1] if start else 0
            fits = int(np.searchsorted(sizes, before + _GROUP_BYTES - size, side="right"))
            stop = min(start + _GROUP_ROWS - rows, max(fits, start + (not rows)), table.num_rows)
            waiting.append(table.slice(start, stop - start))
            rows, size = rows + stop - start, size + int((sizes[stop - 1] if stop else 0) - before)
            start = stop
            if start < table.num_rows or rows == _GROUP_ROWS:
                yield pa.concat_tables(waiting)
                waiting, rows, size = [], 0, 0
    if rows:
        yield pa.concat_tables(waiting)


def row_bytes(table: pa.Table) -> npt.NDArray[np.int64]:
    """About how many bytes each row has [n]: those of its texts and lists, and eight per other value."""
    sizes = np.full(table.num_rows, 8 * table.num_columns, np.int64)
    for column in table.columns:
        kind = column.type
        if pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind):
            sizes += compute.fill_null(compute.binary_length(column), 0).to_numpy().astype(np.int64)
        elif pa.types.is_fixed_size_list(kind):
            sizes += kind.list_size * max(1, kind.value_type.bit_width // 8) if _is_number(kind.value_type) else 0
        elif pa.types.is_list(kind):
            sizes += compute.fill_null(compute.list_value_length(column), 0).to_numpy().astype(np.int64) * _bytes_of(
                kind.value_type
            )
    return sizes


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _bytes_of(kind: pa.DataType) -> int:
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size * _bytes_of(kind.value_type)
    return max(1, kind.bit_width // 8) if _is_number(kind) else 16


def _exploded(part: pa.Table) -> pa.Table:
    """A row per chunk. A text that failed keeps one row."""
    lengths = np.asarray(compute.fill_null(compute.list_value_length(part[CHUNKS]), 0)).astype(np.int64)
    rows = np.repeat(np.arange(part.num_rows), np.maximum(lengths, 1))
    starts = np.cumsum(np.maximum(lengths, 1)) - np.maximum(lengths, 1)
    failed = np.repeat(lengths == 0, np.maximum(lengths, 1))
    positions = np.cumsum(~failed) - 1
    chunks = part[CHUNKS].combine_chunks()
    flat = chunks.flatten().take(pa.array(positions, mask=failed))
    table = part.drop_columns([CHUNKS]).take(pa.array(rows))
    numbers = pa.array((np.arange(len(rows)) - starts[rows]).astype(np.int32), mask=failed)
    table = table.append_column("chunk", numbers)
    for field in flat.type:
        table = table.append_column(field, compute.struct_field(flat, field.name))
    return table


def _in_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns: list[Any] = []
    for field in schema:
        if field.name not in table.schema.names:
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column, own = table[field.name], table.schema.field(field.name)
        if is_json(own) and not is_json(field):
            column = json_as_texts(column) if pa.types.is_string(field.type) else pa.array(json_values(column), field.type)
        elif is_json(field) and not is_json(own):
            column = pa.array([_encode(value).decode() for value in column.to_pylist()], pa.string())
        elif pa.types.is_string(field.type) and pa.types.is_nested(column.type):
            column = pa.array(map(_as_text, column.to_pylist()), pa.string())
        columns.append(column.cast(field.type) if column.type != field.type else column)
    return pa.table(columns, schema=schema)


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else _encode(value).decode()


def _type_of(column: pa.ChunkedArray) -> pa.DataType | None:
    """The Arrow type of JSON values; None if they have none in common."""
    if are_json_texts(column):
        return pa.null() if column.null_count == len(column) else pa.string()
    try:
        return pa.array(json_values(column)).type
    except (pa.ArrowException, OverflowError, msgspec.DecodeError):
        return None


# -- formats -------------------------------------------------------------------------------------------------------------


def _write_parquet(tables: Tables, schema: pa.Schema, path: Path) -> None:
    """Vectors are stored as they are: floats hardly compress."""
    plain: Any = [field.name for field in schema if not pa.types.is_nested(field.type)]
    empty = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), empty)
    leaves = [column.path for column in pq.ParquetFile(empty.getvalue()).schema]  # numbers within vectors have names of their own
    compression: Any = {name: "zstd" if name in plain else "none" for name in leaves}
    with pq.ParquetWriter(path, schema, compression=compression, use_dictionary=plain, write_statistics=plain) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=_GROUP_ROWS)


def _write_arrow(tables: Tables, schema: pa.Schema, path: Path) -> None:
    with path.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
        for table in tables:
            writer.write_table(table.combine_chunks())


def _write_npy(tables: Tables, schema: pa.Schema, path: Path) -> None:
    """One array [n, width] for numpy.load, which can map it into memory."""
    vector = vector_of(schema)
    kind, rows = np.dtype(vector.type.value_type.to_pandas_dtype()), 0

    def header(file: BinaryIO) -> None:
        shape = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (rows, vector.type.list_size)}
        np.lib.format.write_array_header_1_0(file, shape)

    with path.open("wb") as file:
        header(file)
        for table in tables:
            column = table[vector.name].combine_chunks()
            if column.null_count:
                column = compute.if_else(column.is_valid(), column, pa.scalar([np.nan] * vector.type.list_size, vector.type))
            file.write(np.ascontiguousarray(column.flatten().to_numpy(zero_copy_only=False), kind).tobytes())
            rows += table.num_rows
        file.seek(0)  # numpy pads the header so that the number of rows can grow in place
        header(file)


def _check_npy(schema: pa.Schema, dtype: str) -> None:
    vector_of(schema)


def _write_jsonl(tables: Tables, schema: pa.Schema, path: Path) -> None:
    with path.open("wb") as file:
        for table in tables:
            file.write(json_lines(table))


def _write_bulk(tables: Tables, schema: pa.Schema, path: Path) -> None:
    """The bulk format of Elasticsearch and OpenSearch: an action and a document per row; rows that failed are left out.

    Documents go to the index in the URL, as in `curl --data-binary @FILE localhost:9200/NAME/_bulk`.
    """
    id_column = id_of(schema)
    with path.open("wb") as file:
        for table in tables:
            there = table.filter(compute.is_null(table["error"]))
            ids = there[id_column].to_pylist()
            for id_, line in zip(ids, json_lines(there).splitlines(keepends=True), strict=True):
                action = {"index": {"_id": str(msgspec.json.decode(id_) if is_json(schema.field(id_column)) else id_)}}
                file.write(_encode(action) + b"\n" + line)


def id_of(schema: pa.Schema) -> str:
    """The column that identifies rows."""
    return msgspec.json.decode(schema.metadata[METADATA])["id"]


def json_lines(table: pa.Table) -> bytes:
    """A JSON object per row. `error` is there only for rows that failed; other columns may be null."""
    columns = {field.name: _json_values(table[field.name], field) for field in table.schema}
    errors = columns.pop("error", itertools.repeat(None))
    names = list(columns)
    lines: list[bytes] = []
    for error, *values in zip(errors, *columns.values(), strict=False):
        row = dict(zip(names, values, strict=True))
        if error is not None:
            row["error"] = error
        lines.append(_encode(row))
    return b"".join(line + b"\n" for line in lines)


def _json_values(column: pa.ChunkedArray, field: pa.Field) -> Iterable[Any]:
    if is_json(field):
        return (None if text is None else msgspec.Raw(text.encode()) for text in column.to_pylist())
    if pa.types.is_fixed_size_list(field.type):
        whole = column.combine_chunks()
        width = field.type.list_size
        numbers = np.asarray(whole.values.slice(whole.offset * width, len(whole) * width)).reshape(len(whole), width)
        valid = whole.is_valid().to_pylist()
        return (row.tolist() if is_valid else None for row, is_valid in zip(numbers, valid, strict=True))
    return column.to_pylist()


def _plain(value: Any) -> Any:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


_encode = msgspec.json.Encoder(enc_hook=_plain, decimal_format="number").encode

FORMATS: dict[str, Format] = {
    ".parquet": Format(write=_write_parquet),
    ".arrow": Format(write=_write_arrow),
    ".feather": Format(write=_write_arrow),
    ".npy": Format(
        write=_write_npy, check=_check_npy, has_null=lambda schema: pa.types.is_floating(vector_of(schema).type.value_type)
    ),
    ".jsonl": Format(write=_write_jsonl, typed=False),
    ".bulk": Format(write=_write_bulk, typed=False),
    ".faiss": Format(write=write_faiss, check=partial(check_index, "faiss")),
    ".usearch": Format(write=write_usearch, check=partial(check_index, "usearch")),
}
