"""The databases that jobs write to: a sink is one file, and one row here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from npu_proxy.bulk.sinks.base import Place, Sink
from npu_proxy.errors import InputError


class Row(NamedTuple):
    """The module and class of a sink, the package it needs, and the extra that installs it."""

    module: str
    name: str
    package: str
    extra: str


SINKS = {
    "lancedb": Row("lancedb", "LanceSink", "lancedb", "lancedb"),
    "qdrant": Row("qdrant", "QdrantSink", "qdrant_client", "qdrant"),
    "duckdb": Row("duckdb", "DuckSink", "duckdb", "duckdb"),
    "postgresql": Row("postgres", "PostgresSink", "psycopg", "postgresql"),
}
"""Sinks by the scheme of an output."""
TABLE = "texts"
"""The table's name if the output names none."""


@dataclass(frozen=True, kw_only=True)
class Database:
    """An output that is a table of a database. work: what names its work folder, which is in the current folder."""

    scheme: str
    location: str
    table: str

    @property
    def work(self) -> Path:
        """A file that is never written; the work folder stands beside it."""
        return Path.cwd() / re.sub(r"[^A-Za-z0-9.]+", "_", f"{self.location}_{self.table}").strip("_")


def as_target(output: str) -> Path | Database:
    """An output: a file, or a table such as `lancedb:FOLDER#TABLE`."""
    found = re.fullmatch(rf"({'|'.join(SINKS)}):(.+?)(?:#([^#]+))?", output)
    if found is None:
        return Path(output)
    scheme, location, table = found[1], found[2], found[3] or TABLE
    return Database(scheme=scheme, location=f"{scheme}:{location}" if scheme == "postgresql" else location, table=table)


def open_sink(scheme: str, place: Place) -> Sink:
    """Open a database. Raises InputError if its package is not installed, or the database cannot be opened."""
    row = SINKS[scheme]
    if find_spec(row.package) is None:
        raise InputError(f"this output needs {row.package}: pip install npu-proxy[{row.extra}]", param="output")
    sink = getattr(import_module(f"npu_proxy.bulk.sinks.{row.module}"), row.name)
    try:
        return sink(place)
    except InputError:
        raise
    except Exception as error:  # each database has errors of its own
        what = " ".join(str(error).split())[:300]
        raise InputError(f"`{place.location}` cannot be opened: {type(error).__name__}: {what}", param="output") from error
