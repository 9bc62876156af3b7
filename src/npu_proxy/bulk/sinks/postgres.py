"""PostgreSQL with pgvector: `postgresql://USER@HOST/DATABASE#TABLE`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from npu_proxy.bulk.sinks.base import Place, checked_name, quoted
from npu_proxy.errors import InputError

_BATCH = 10_000
_TYPES: Sequence[tuple[Callable[[pa.DataType], bool], str]] = (
    (pa.types.is_boolean, "boolean"),
    (pa.types.is_integer, "bigint"),
    (pa.types.is_floating, "double precision"),
    (pa.types.is_string, "text"),
    (pa.types.is_large_string, "text"),
    (pa.types.is_timestamp, "timestamptz"),
    (pa.types.is_date, "date"),
)
"""Column types; other values are stored as jsonb."""


class PostgresSink:
    """A table with the key as primary key and vectors as pgvector's `vector`. What made the vectors is the table's comment.

    Rows are copied into a temporary table and merged in one transaction.
    """

    def __init__(self, place: Place) -> None:
        import psycopg  # type: ignore[import-not-found]  # an optional package
        from pgvector.psycopg import register_vector  # type: ignore[import-not-found]  # an optional package

        self._place = place
        self._name = checked_name(place.table)
        self._key = quoted(place.key)
        self._connection: Any = psycopg.connect(place.location, connect_timeout=10)
        self._connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        self._connection.commit()
        register_vector(self._connection)

    def metadata(self) -> Mapping[str, Any] | None:
        found = self._connection.execute("SELECT to_regclass(%s), obj_description(to_regclass(%s))", [self._name] * 2).fetchone()
        self._connection.commit()
        return None if found[0] is None else json.loads(found[1] or "{}")

    def known(self) -> Iterator[pa.Table]:
        if self.metadata() is None:
            return
        with self._connection.transaction(), self._connection.cursor(name="known") as cursor:
            cursor.itersize = _BATCH
            cursor.execute(f"SELECT {self._key}, hash FROM {self._name}")
            while rows := cursor.fetchmany(_BATCH):
                keys, hashes = zip(*rows, strict=True)
                yield pa.table({self._place.key: list(keys), "hash": list(hashes)})

    def upsert(self, rows: pa.Table) -> None:
        names = [quoted(name) for name in rows.schema.names]
        kinds = [self._kind(field) for field in rows.schema]
        with self._connection.transaction():
            if self.metadata_inside() is None:
                columns = ", ".join(f"{name} {kind}" for name, kind in zip(names, kinds, strict=True))
                self._connection.execute(f"CREATE TABLE {self._name} ({columns}, PRIMARY KEY ({self._key}))")
                comment = json.dumps(dict(self._place.metadata)).replace("'", "''")
                self._connection.execute(f"COMMENT ON TABLE {self._name} IS '{comment}'")
            self._connection.execute(f"CREATE TEMP TABLE new_rows (LIKE {self._name}) ON COMMIT DROP")
            copy = f"COPY new_rows ({', '.join(names)}) FROM STDIN"
            with self._connection.cursor() as cursor, cursor.copy(copy) as writer:
                columns = [_values(rows[field.name], field, kind) for field, kind in zip(rows.schema, kinds, strict=True)]
                for row in zip(*columns, strict=True):
                    writer.write_row(row)
            changes = ", ".join(f"{name} = EXCLUDED.{name}" for name in names if name != self._key)
            self._connection.execute(
                f"INSERT INTO {self._name} ({', '.join(names)}) SELECT {', '.join(names)} FROM new_rows"
                f" ON CONFLICT ({self._key}) DO UPDATE SET {changes}"
            )

    def metadata_inside(self) -> str | None:
        """Whether the table exists, within a transaction."""
        return self._connection.execute("SELECT to_regclass(%s)", [self._name]).fetchone()[0]

    def delete(self, keys: Sequence[Any]) -> None:
        with self._connection.transaction():
            self._connection.execute(f"DELETE FROM {self._name} WHERE {self._key} = ANY(%s)", [list(keys)])

    def drop(self) -> None:
        with self._connection.transaction():
            self._connection.execute(f"DROP TABLE IF EXISTS {self._name}")

    def close(self) -> None:
        self._connection.close()

    def _kind(self, field: pa.Field) -> str:
        if field.name == self._place.vector:
            if not pa.types.is_fixed_size_list(field.type) or not pa.types.is_floating(field.type.value_type):
                raise InputError("pgvector stores dense float vectors; set --dtype to float32 or float16", param="dtype")
            return f"vector({field.type.list_size})"
        return next((kind for fits, kind in _TYPES if fits(field.type)), "jsonb")


def _values(column: pa.ChunkedArray, field: pa.Field, kind: str) -> Sequence[Any]:
    if kind.startswith("vector"):
        whole = column.combine_chunks()
        flat = np.asarray(whole.flatten(), np.float32).reshape(-1, field.type.list_size)
        return [f"[{','.join(map(repr, row.tolist()))}]" for row in flat]
    values: list[Any] = column.to_pylist()
    if kind == "jsonb":
        return [None if value is None else json.dumps(value, default=str) for value in values]
    if kind == "text":
        return [value and value.replace("\0", "\ufffd") for value in values]  # PostgreSQL's text has no NUL
    return values
