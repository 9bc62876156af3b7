"""What a database provides so that a job can write to it. Writing a row again replaces it, so a delivery can be repeated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from npu_proxy.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where rows go: a table (or collection) of a database, the column that identifies rows, and the column of vectors.

    metadata: what made the vectors. A database keeps it with the table.
    """

    location: str
    table: str
    key: str
    vector: str
    metadata: Mapping[str, Any]


class Sink(Protocol):
    """A table of a database. Methods are called from one thread at a time."""

    def metadata(self) -> Mapping[str, Any] | None:
        """What made the table's vectors; None if there is no such table, {} if that is not known."""
        ...

    def known(self) -> Iterator[pa.Table]:
        """The columns of the key and `hash` of all rows, in tables of bounded size."""
        ...

    def upsert(self, rows: pa.Table) -> None:
        """Insert rows, or replace those with the same key. The first call makes the table if there is none."""
        ...

    def delete(self, keys: Sequence[Any]) -> None:
        """Delete rows by their keys."""
        ...

    def drop(self) -> None:
        """Delete the table."""
        ...

    def close(self) -> None:
        """Finish what is open."""
        ...


OpenSink = Callable[[Place], Sink]


def checked_name(name: str) -> str:
    """A name of a table that needs no quotes. Raises InputError for another one."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,62}", name):
        raise InputError(f"`{name}` is not a valid name of a table: use letters, digits and underscores", param="output")
    return name


def quoted(name: str) -> str:
    """A name of a column in SQL."""
    return '"' + name.replace('"', '""') + '"'
