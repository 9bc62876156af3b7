"""What the modules of this folder share about Arrow tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute

compute: Any = pyarrow.compute
"""pyarrow.compute, which makes its functions when it is imported, so that type checkers do not know them."""
JSON = {b"npu_proxy": b"json"}
"""Metadata of a column that holds values as JSON text."""


def is_json(field: pa.Field) -> bool:
    """Whether a column holds values as JSON text."""
    return (field.metadata or {}).get(b"npu_proxy") == JSON[b"npu_proxy"]


def json_values(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column of JSON text; None for null. All are decoded in one call, which is several times faster.

    Raises msgspec.DecodeError for a value that has no Python equivalent.
    """
    texts: list[str | None] = column.to_pylist()
    return msgspec.json.decode(f"[{','.join('null' if text is None else text for text in texts)}]")


def are_json_texts(column: pa.ChunkedArray) -> bool:
    """Whether all values of a column of JSON text are texts that need no decoding."""
    if compute.any(compute.match_substring(column, "\\")).as_py():
        return False
    return compute.all(compute.starts_with(column, '"')).as_py() is not False


def json_as_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values of a column of JSON text as texts: texts as they are, null as null, others as JSON."""
    if are_json_texts(column):
        return compute.utf8_slice_codeunits(column, 1, -1)
    texts = [None if text is None or text == "null" else text for text in column.to_pylist()]
    return pa.chunked_array([[msgspec.json.decode(text) if text and text[0] == '"' else text for text in texts]], pa.string())


def no_columns(rows: int) -> pa.Table:
    """A table of rows without columns."""
    return pa.table({"": pa.nulls(rows)}).select([])


def read_mapped(file: Path) -> pa.Table:
    """An Arrow file as a table whose columns are not in memory until they are used."""
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
