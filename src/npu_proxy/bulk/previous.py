"""The output of an earlier run, from which texts that have not changed take what was computed for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from npu_proxy.bulk.columns import CHUNKS
from npu_proxy.bulk.duplicates import Digests, Numbers, from_hexadecimal
from npu_proxy.bulk.files import readable
from npu_proxy.bulk.rows import ERROR, HASH, INDEX, PREVIOUS, RowOptions
from npu_proxy.bulk.writers import METADATA
from npu_proxy.errors import InputError

Groups = tuple[Sequence[int], Callable[[int, Sequence[str]], pa.Table], pa.Schema]
"""The number of rows of each group of a file, how to read columns of a group, and the file's schema."""


class Previous:
    """An earlier output. A row of it is a text, even if the text has a row per chunk in the file."""

    def __init__(self, path: Path, rows: RowOptions, metadata: Mapping[str, Any]) -> None:
        """Raises InputError if the file is not an output that can be brought up to date, or was made in another way."""
        opened = _READERS.get(path.suffix.lower())
        if opened is None:
            raise InputError(f"only {' and '.join(_READERS)} outputs can be brought up to date; use --overwrite", param="update")
        with readable(str(path)):
            sizes, read, schema = opened(path)
        _check_made_alike(path, schema, metadata, [INDEX, HASH, ERROR])
        self._read = lru_cache(maxsize=2)(read)
        self._starts = np.cumsum([0, *sizes])
        self._computed = rows.columns.schema
        self._chunked = CHUNKS in self._computed.names
        index = self._column(INDEX)
        # The first row of each text, and the end of the last.
        self._texts = np.append(np.flatnonzero(np.diff(index, prepend=-1)), len(index))

    def __len__(self) -> int:
        return len(self._texts) - 1

    def hashes(self) -> Iterator[tuple[Digests, Numbers]]:
        """The digests of texts that did not fail, each once, and their numbers."""
        seen: set[str] = set()
        first = 0
        for group in range(len(self._starts) - 1):
            table = self._read(group, (HASH, ERROR))
            rows = np.arange(first, first + table.num_rows)
            numbers = np.searchsorted(self._texts, rows, side="right") - 1
            names: list[str] = []
            found: list[int] = []
            for name, error, number in zip(table[HASH].to_pylist(), table[ERROR].to_pylist(), numbers.tolist(), strict=True):
                if name is not None and error is None and name not in seen:
                    seen.add(name)
                    names.append(name)
                    found.append(number)
            first += table.num_rows
            yield from_hexadecimal(names), np.array(found, np.int64) + PREVIOUS

    def take(self, numbers: Numbers) -> pa.Table:
        """What was computed for texts, by their numbers; as a job has it, so with a list of chunks per text."""
        numbers = numbers - PREVIOUS
        starts, stops = self._texts[numbers], self._texts[numbers + 1]
        if not self._chunked:
            return self._rows(starts, [*self._computed.names, ERROR])
        inner = self._computed.field(CHUNKS).type.value_type
        flat = np.concatenate([np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)])
        parts = self._rows(flat, [field.name for field in inner])
        struct = pa.StructArray.from_arrays([parts[field.name].combine_chunks() for field in inner], fields=list(inner))
        offsets = pa.array(np.cumsum([0, *(stops - starts)]), pa.int32())
        others = self._rows(starts, ["tokens", "truncated", ERROR])
        return others.add_column(0, CHUNKS, pa.ListArray.from_arrays(offsets, struct))

    def _rows(self, rows: Numbers, names: Sequence[str]) -> pa.Table:
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        cuts = np.flatnonzero(np.diff(owners, prepend=-1))
        tables: list[pa.Table] = []
        for part, owner in zip(np.split(rows, cuts[1:]), owners[cuts], strict=True):
            tables.append(self._read(int(owner), tuple(names)).take(pa.array(part - self._starts[owner])))
        return pa.concat_tables(tables)

    def _column(self, name: str) -> Numbers:
        groups = range(len(self._starts) - 1)
        return np.concatenate([np.zeros(0, np.int64), *(self._read(group, (name,))[name].to_numpy() for group in groups)])


def _check_made_alike(path: Path, schema: pa.Schema, metadata: Mapping[str, Any], names: Sequence[str]) -> None:
    found = (schema.metadata or {}).get(METADATA)
    missing = [name for name in names if name not in schema.names]
    if found is None or missing:
        raise InputError(f"`{path}` is no output of npu-proxy embed, so it cannot be brought up to date", param="update")
    before = json.loads(found)
    for name, value in metadata.items():
        if before.get(name) != value:
            message = f"`{path}` was made with {name}={before.get(name)}, and now it is {value}; compute all of it with --overwrite"
            raise InputError(message, param=name)


def _parquet(path: Path) -> Groups:
    file = pq.ParquetFile(path)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return sizes, lambda group, names: file.read_row_group(group, list(names)), file.schema_arrow


def _arrow(path: Path) -> Groups:
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    batches = [file.get_batch(number) for number in range(file.num_record_batches)]
    return [batch.num_rows for batch in batches], lambda group, names: pa.table(batches[group].select(list(names))), file.schema


_READERS: dict[str, Callable[[Path], Groups]] = {".parquet": _parquet, ".arrow": _arrow, ".feather": _arrow}
