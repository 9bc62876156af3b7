"""Vectors on disk, in LMDB: several processes share a folder, and a kill at any moment loses no committed entry.

Two generations share the limit. New entries go to the young one; when it is full the old one is emptied, in the same
transaction, and they change places. What is found in the old one is written to the young one again, so what is used
stays. An entry costs no bookkeeping of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from npu_proxy.cache.entry import FINGERPRINT_BYTES, fingerprint_bytes
from npu_proxy.cache.tier import TierError, TierStats

log = logging.getLogger("npu_proxy.cache")

_LEAST_MAP = 4 << 30
"""Address space; the file grows only with what is written. The same for all processes up to limits of half of it."""
_GENERATIONS = (b"a", b"b")
_YOUNG = b"young"
_PROMOTED = 4096
"""Keys found in the old generation that are remembered for the next write, at most."""


class DiskTier:
    """Entries in ``folder``, ``limit`` bytes at most. ``open`` may wait for another process's lock, so nobody else does."""

    name = "disk"

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._open = threading.Lock()
        self._env: Any = None
        self._databases: dict[bytes, Any] = {}
        self._promote: dict[bytes, bytes] = {}

    def open(self) -> None:
        """Open the folder, and make it where there is none. Raises TierError."""
        with self._open, _errors(self._folder):
            if self._env is not None:
                return
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = self._folder / "data.mdb"
            there = file.stat().st_size if file.exists() else 0  # of a time with a larger limit, perhaps
            size = max(_LEAST_MAP, 1 << (2 * max(self._limit, there)).bit_length())
            try:
                self._env = self._opened(size)
            except (lmdb.CorruptedError, lmdb.InvalidError, lmdb.VersionMismatchError) as error:
                log.warning("%s cannot be read (%s); beginning anew", self._folder, error)
                for file in ("data.mdb", "lock.mdb"):
                    (self._folder / file).unlink(missing_ok=True)
                self._env = self._opened(size)

    def _opened(self, size: int) -> Any:
        # Without metasync a power cut may lose the last transaction, and never an earlier one or the file.
        env = lmdb.open(str(self._folder), map_size=size, max_dbs=2, metasync=False, max_readers=512, mode=0o600)
        try:
            env.reader_check()  # readers that were killed no longer hold old pages
            info, page = env.info(), env.stat()["psize"]
            if (self._folder / "data.mdb").stat().st_size < (info["last_pgno"] + 1) * page:  # reading on would end the process
                raise lmdb.CorruptedError("the file is shorter than it says")
            self._databases = {name: env.open_db(name) for name in _GENERATIONS}
        except BaseException:
            env.close()
            raise
        return env

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values; None for all before it is open."""
        env = self._env
        if env is None:
            return [None] * len(keys)
        found: list[bytes | None] = []
        with _errors(self._folder), env.begin() as read:
            young, old = self._order(read)
            for key in keys:
                value = read.get(key, db=young)
                if value is None:
                    value = read.get(key, db=old)
                    if value is not None and len(self._promote) < _PROMOTED:
                        self._promote[key] = value
                found.append(value)
        return found

    def put_many(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        """One transaction. A full generation makes room first."""
        self.open()
        promoted, self._promote = self._promote, {}
        everything = [*promoted.items(), *items]
        with _errors(self._folder):
            try:
                self._put(everything)
            except lmdb.MapFullError:  # pages are free only after the transaction that freed them
                with self._env.begin(write=True) as write:
                    self._turn(write)
                self._put(everything)

    def stats(self) -> TierStats:
        """Entries by fingerprint and bytes of their pages."""
        self.open()
        entries: dict[str, int] = {}
        with _errors(self._folder), self._env.begin() as read:
            size = sum(_bytes(read, database) for database in self._databases.values())
            for database in self._databases.values():
                for key in read.cursor(database).iternext(keys=True, values=False):
                    name = key[:FINGERPRINT_BYTES].decode("ascii", "replace")
                    entries[name] = entries.get(name, 0) + 1
        return TierStats(name=self.name, entries=entries, size=size, limit=self._limit)

    def clear(self, fingerprint: str | None) -> int:
        """Remove everything, or the entries of one model."""
        self.open()
        removed = 0
        with _errors(self._folder), self._env.begin(write=True) as write:
            for database in self._databases.values():
                if fingerprint is None:
                    removed += write.stat(database)["entries"]
                    write.drop(database, delete=False)
                else:
                    removed += _remove(write.cursor(database), fingerprint_bytes(fingerprint))
        return removed

    def close(self) -> None:
        """Close the file; what is committed stays."""
        with self._open:
            env, self._env = self._env, None
            if env is not None:
                env.close()

    def _order(self, transaction: Any) -> tuple[Any, Any]:
        """The young and the old generation."""
        first = transaction.get(_YOUNG) != _GENERATIONS[1]
        young, old = _GENERATIONS if first else _GENERATIONS[::-1]
        return self._databases[young], self._databases[old]

    def _put(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        with self._env.begin(write=True) as write:
            young, _ = self._order(write)
            if _bytes(write, young) > self._limit // 2:
                young = self._turn(write)
            write.cursor(young).putmulti(sorted(items))

    def _turn(self, write: Any) -> Any:
        """Empty the old generation and make it the young one, which is returned."""
        self._env.reader_check()  # those who were killed while reading hold no pages any more
        young, old = self._order(write)
        write.drop(old, delete=False)
        write.put(_YOUNG, _GENERATIONS[1] if young is self._databases[_GENERATIONS[0]] else _GENERATIONS[0])
        return old


def _bytes(transaction: Any, database: Any) -> int:
    stat = transaction.stat(database)
    return stat["psize"] * (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"])


def _remove(cursor: Any, prefix: bytes) -> int:
    removed = 0
    while cursor.set_range(prefix) and cursor.key().startswith(prefix):
        cursor.delete()
        removed += 1
    return removed


@contextmanager
def _errors(folder: Path) -> Generator[None]:
    """LMDB's errors as TierError, with the cure where there is one."""
    try:
        yield
    except lmdb.MapResizedError as error:
        raise TierError(f"{folder} is open elsewhere with a larger `cache_disk_mb`; give both the same") from error
    except (lmdb.CorruptedError, lmdb.InvalidError, lmdb.VersionMismatchError) as error:
        raise TierError(f"{folder} is damaged or of another version ({error}); remove the folder") from error
    except lmdb.Error as error:
        same = "already open in this process" in str(error)
        hint = "; let the engines of a process share one cache, Engine(cache=...)" if same else ""
        raise TierError(f"{folder}: {error}{hint}") from error
    except OSError as error:
        raise TierError(f"{folder}: {error.strerror or error}; free space, or set `cache_folder`") from error
