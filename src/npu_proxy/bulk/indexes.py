"""Write vectors as indexes of FAISS and USearch. Keys are the rows' numbers (`index`); NAME.rows.parquet has the other columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from npu_proxy.errors import InputError

_INDEX = "index"


def write_faiss(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """An exact index (IndexFlatIP for floats, IndexBinaryFlat for ubinary) with the rows' numbers as ids. It is made in memory."""
    import faiss  # type: ignore[import-not-found]  # an optional package

    vector = vector_of(schema)
    width, is_bits = vector.type.list_size, pa.types.is_uint8(vector.type.value_type)
    flat: Any = faiss.IndexBinaryFlat(width * 8) if is_bits else faiss.IndexFlatIP(width)
    index: Any = faiss.IndexBinaryIDMap2(flat) if is_bits else faiss.IndexIDMap2(flat)
    for keys, vectors in _with_rows(tables, schema, path):
        index.add_with_ids(vectors if is_bits else vectors.astype(np.float32), keys)
    write = faiss.write_index_binary if is_bits else faiss.write_index
    write(index, str(path))


def write_usearch(tables: Iterable[pa.Table], schema: pa.Schema, path: Path) -> None:
    """An HNSW index by cosine (by Hamming distance for ubinary) with the rows' numbers as keys. It is made in memory."""
    from usearch.index import Index, MetricKind, ScalarKind  # type: ignore[import-not-found]  # an optional package

    vector = vector_of(schema)
    kinds = {pa.float32(): ScalarKind.F32, pa.float16(): ScalarKind.F16, pa.int8(): ScalarKind.I8, pa.uint8(): ScalarKind.B1}
    kind, width = kinds[vector.type.value_type], vector.type.list_size
    is_bits = kind is ScalarKind.B1
    metric = MetricKind.Hamming if is_bits else MetricKind.Cos
    index: Any = Index(ndim=width * 8 if is_bits else width, metric=metric, dtype=kind)
    for keys, vectors in _with_rows(tables, schema, path):
        index.add(keys, vectors)
    index.save(str(path))


def check_index(package: str, schema: pa.Schema, dtype: str) -> None:
    """Raise InputError unless the package is installed, and there is one vector per row, in numbers that an index takes."""
    if find_spec(package) is None:
        raise InputError(f"this output needs {package}: pip install npu-proxy[{package}]", param="output")
    vector_of(schema)
    if dtype in ("uint8", "binary"):
        raise InputError(f"an index takes no vectors of {dtype}; choose int8 or ubinary for --dtype", param="dtype")


def vector_of(schema: pa.Schema) -> pa.Field:
    """The column of vectors. Raises InputError if rows have none of fixed length."""
    found = [field for field in schema if pa.types.is_fixed_size_list(field.type)]
    if not found:
        message = "this format stores one vector of numbers per row, so neither base64, sparse and token vectors nor labels"
        raise InputError(f"{message}; write jsonl or parquet", param="output")
    return found[-1]  # columns of the input stand before it


def _with_rows(
    tables: Iterable[pa.Table], schema: pa.Schema, path: Path
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
    """Keys and vectors of each table; writes the other columns. A row without a vector has no key."""
    vector = vector_of(schema)
    others = schema.remove(schema.get_field_index(vector.name))
    with pq.ParquetWriter(rows_file(path), others, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table.select(others.names))
            there = table.filter(table[vector.name].is_valid())
            flat = there[vector.name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            yield there[_INDEX].to_numpy(), np.ascontiguousarray(flat).reshape(-1, vector.type.list_size)


def rows_file(path: Path) -> Path:
    """The file of the other columns, next to an index."""
    return path.with_name(f"{path.name}.rows.parquet")
