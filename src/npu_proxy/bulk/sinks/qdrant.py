"""Qdrant: `qdrant:http://HOST:6333#COLLECTION`, or `qdrant:FOLDER#COLLECTION` for its local mode."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from npu_proxy.bulk.sinks.base import Place
from npu_proxy.errors import InputError

_BATCH = 1000
_SECONDS = 60
_MADE_BY = "npu_proxy"
"""The point that says what made the vectors, where a server cannot keep it with the collection."""


class QdrantSink:
    """A collection of Qdrant. A point's id is a UUID made of the key, which is in the payload with the other columns.

    Vectors have names: `dense`, `sparse` (indices and values) and `tokens` (a multi-vector, compared by MaxSim).
    """

    def __init__(self, place: Place) -> None:
        from qdrant_client import QdrantClient, models  # type: ignore[import-not-found]  # an optional package

        self._place = place
        self._models: Any = models
        remote = "://" in place.location
        self._client: Any = QdrantClient(url=place.location, timeout=_SECONDS) if remote else QdrantClient(path=place.location)

    def metadata(self) -> Mapping[str, Any] | None:
        if not self._client.collection_exists(self._place.table):
            return None
        found = self._client.retrieve(self._place.table, [_point(_MADE_BY)], with_payload=True)
        return json.loads(found[0].payload[_MADE_BY]) if found else {}

    def known(self) -> Iterator[pa.Table]:
        if self.metadata() is None:
            return
        offset: Any = None
        while True:
            points, offset = self._client.scroll(
                self._place.table, limit=_BATCH, offset=offset, with_payload=[self._place.key, "hash"], with_vectors=False
            )
            rows = [point.payload for point in points if self._place.key in point.payload]
            yield pa.table({name: [row[name] for row in rows] for name in (self._place.key, "hash")})
            if offset is None:
                return

    def upsert(self, rows: pa.Table) -> None:
        models = self._models
        vectors = [field for field in rows.schema if _kind_of(field) and field.name.startswith(self._place.vector)]
        if not self._client.collection_exists(self._place.table):
            self._create(vectors)
        columns = {_kind_of(field): _vectors(models, rows[field.name], field) for field in vectors}
        payload = rows.drop_columns([field.name for field in vectors]).to_pylist()
        for first in range(0, rows.num_rows, _BATCH):
            points = [
                models.PointStruct(
                    id=_point(str(payload[row][self._place.key])),
                    vector={name: values[row] for name, values in columns.items()},
                    payload=msgspec.to_builtins(payload[row], enc_hook=str, str_keys=True),
                )
                for row in range(first, min(first + _BATCH, rows.num_rows))
            ]
            self._client.upsert(self._place.table, points, wait=True)

    def delete(self, keys: Sequence[Any]) -> None:
        for first in range(0, len(keys), _BATCH):
            self._client.delete(self._place.table, [_point(str(key)) for key in keys[first : first + _BATCH]], wait=True)

    def drop(self) -> None:
        self._client.delete_collection(self._place.table)

    def close(self) -> None:
        self._client.close()

    def _create(self, vectors: Sequence[pa.Field]) -> None:
        models = self._models
        dense: dict[str, Any] = {}
        sparse: dict[str, Any] = {}
        for field in vectors:
            match _kind_of(field):
                case "dense":
                    dense["dense"] = models.VectorParams(size=field.type.list_size, distance=models.Distance.COSINE)
                case "tokens":
                    width = field.type.value_type.list_size
                    comparison = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
                    dense["tokens"] = models.VectorParams(
                        size=width, distance=models.Distance.COSINE, multivector_config=comparison
                    )
                case _:
                    sparse["sparse"] = models.SparseVectorParams()
        if not (dense or sparse):
            raise InputError("Qdrant stores vectors of float32 or float16; set --dtype", param="dtype")
        self._client.create_collection(self._place.table, vectors_config=dense, sparse_vectors_config=sparse or None)
        made_by = {_MADE_BY: json.dumps(dict(self._place.metadata))}
        self._client.upsert(self._place.table, [models.PointStruct(id=_point(_MADE_BY), vector={}, payload=made_by)], wait=True)


def _point(key: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, key))


def _kind_of(field: pa.Field) -> str:
    """The name of a vector by the type of its column; empty if it is none."""
    kind = field.type
    if pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type):
        return "dense"
    if pa.types.is_list(kind) and pa.types.is_fixed_size_list(kind.value_type):
        return "tokens"
    return "sparse" if pa.types.is_struct(kind) and [part.name for part in kind] == ["indices", "values"] else ""


def _vectors(models: Any, column: pa.ChunkedArray, field: pa.Field) -> Sequence[Any]:
    match _kind_of(field):
        case "dense":
            flat = np.asarray(column.combine_chunks().flatten()).astype(np.float32)
            return flat.reshape(-1, field.type.list_size).tolist()
        case "tokens":
            return column.to_pylist()
        case _:
            return [models.SparseVector(**value) for value in column.to_pylist()]
