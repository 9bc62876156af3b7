"""DuckDB: `duckdb:FILE#TABLE`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from npu_proxy.bulk.sinks.base import Place, checked_name, quoted

_BATCH = 100_000


class DuckSink:
    """A table of DuckDB, with the key as primary key and vectors as FLOAT[n]. What made the vectors is the table's comment."""

    def __init__(self, place: Place) -> None:
        import duckdb  # type: ignore[import-not-found]  # an optional package

        self._place = place
        self._name = checked_name(place.table)
        self._key = quoted(place.key)
        self._connection: Any = duckdb.connect(place.location)

    def metadata(self) -> Mapping[str, Any] | None:
        query = "SELECT comment FROM duckdb_tables() WHERE table_name = ?"
        found = self._connection.execute(query, [self._name]).fetchone()
        return None if found is None else json.loads(found[0] or "{}")

    def known(self) -> Iterator[pa.Table]:
        if self.metadata() is None:
            return
        cursor = self._connection.execute(f"SELECT {self._key}, hash FROM {self._name}")
        while rows := cursor.fetchmany(_BATCH):
            keys, hashes = zip(*rows, strict=True)
            yield pa.table({self._place.key: list(keys), "hash": list(hashes)})

    def upsert(self, rows: pa.Table) -> None:
        rows = _without_halves(rows)
        connection = self._connection
        connection.register("new_rows", rows)
        connection.execute("BEGIN")
        try:
            if self.metadata() is None:
                connection.execute(f"CREATE TABLE {self._name} AS SELECT * FROM new_rows LIMIT 0")
                connection.execute(f"ALTER TABLE {self._name} ADD PRIMARY KEY ({self._key})")
                comment = json.dumps(dict(self._place.metadata)).replace("'", "''")
                connection.execute(f"COMMENT ON TABLE {self._name} IS '{comment}'")
            connection.execute(f"INSERT OR REPLACE INTO {self._name} BY NAME SELECT * FROM new_rows")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        finally:
            connection.unregister("new_rows")

    def delete(self, keys: Sequence[Any]) -> None:
        self._connection.register("gone", pa.table({"key": list(keys)}))
        self._connection.execute(f"DELETE FROM {self._name} WHERE {self._key} IN (SELECT key FROM gone)")
        self._connection.unregister("gone")

    def drop(self) -> None:
        self._connection.execute(f"DROP TABLE IF EXISTS {self._name}")

    def close(self) -> None:
        self._connection.close()


def _without_halves(rows: pa.Table) -> pa.Table:
    """DuckDB has no half-precision numbers."""
    for number, field in enumerate(rows.schema):
        if pa.types.is_fixed_size_list(field.type) and field.type.value_type == pa.float16():
            single = pa.list_(pa.float32(), field.type.list_size)
            rows = rows.set_column(number, pa.field(field.name, single), rows[field.name].cast(single))
    return rows
