"""LanceDB: `lancedb:FOLDER#TABLE`, or a URL that LanceDB opens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from npu_proxy.bulk.sinks.base import Place, checked_name
from npu_proxy.bulk.writers import METADATA

_BATCH = 10_000


class LanceSink:
    """A table of LanceDB. Rows are merged by key; each call is a version of the table."""

    def __init__(self, place: Place) -> None:
        import lancedb  # type: ignore[import-not-found]  # an optional package

        self._place = place
        self._name = checked_name(place.table)
        self._database: Any = lancedb.connect(place.location)
        names = self._database.list_tables(limit=1 << 20).tables
        self._table: Any = self._database.open_table(self._name) if self._name in names else None

    def metadata(self) -> Mapping[str, Any] | None:
        if self._table is None:
            return None
        return json.loads((self._table.schema.metadata or {}).get(METADATA, b"{}"))

    def known(self) -> Iterator[pa.Table]:
        if self._table is None:
            return
        count = self._table.count_rows()
        for first in range(0, count, _BATCH):
            yield self._table.search().select([self._place.key, "hash"]).limit(_BATCH).offset(first).to_arrow()

    def upsert(self, rows: pa.Table) -> None:
        if self._table is None:
            self._table = self._database.create_table(self._name, rows)
            return
        merge = self._table.merge_insert(self._place.key)
        merge.when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def delete(self, keys: Sequence[Any]) -> None:
        for first in range(0, len(keys), _BATCH):
            self._table.delete(f"`{self._place.key}` IN ({', '.join(map(_literal, keys[first : first + _BATCH]))})")

    def drop(self) -> None:
        if self._table is not None:
            self._database.drop_table(self._name)
            self._table = None

    def close(self) -> None:
        if self._table is not None:
            self._table.optimize()


def _literal(key: Any) -> str:
    return str(key) if isinstance(key, int) else "'" + str(key).replace("'", "''") + "'"
