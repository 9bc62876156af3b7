"""Vectors on disk, in LMDB: several processes can share a folder, and a process killed at any time loses no committed entry.

Two generations share the limit. New entries go to the young generation; when it is full, the old one is emptied and they
are swapped, in the same transaction. Entries found in the old generation are written to the young one again, so that
entries in use are kept. No bookkeeping per entry is needed.
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
from npu_proxy.cache.tier import VOID_KEY, TierError, TierStats
from npu_proxy.system import private_folder

_log = logging.getLogger("npu_proxy.cache")

_MIN_MAP_SIZE = 4 << 30
"""Bytes of address space; the file grows only as data is written. All processes with limits up to half of it use the same."""
_GENERATIONS = (b"a", b"b")
_YOUNG = b"young"
_MAX_PROMOTED = 4096
"""Maximum number of entries of the old generation that are remembered for the next write."""


class DiskTier:
    """Stores entries in ``folder``, up to ``limit`` bytes. ``get_many`` never opens the folder, which may wait for a lock."""

    name = "disk"

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._open = threading.Lock()
        self._env: Any = None
        self._databases: dict[bytes, Any] = {}
        self._promote: dict[bytes, bytes] = {}

    def open(self) -> None:
        """Open the folder, creating it if necessary. Raises TierError."""
        with self._open, _errors(self._folder):
            if self._env is not None:
                return
            private_folder(self._folder)
            file = self._folder / "data.mdb"
            file_size = file.stat().st_size if file.exists() else 0  # the limit may have been larger before
            size = max(_MIN_MAP_SIZE, 1 << (2 * max(self._limit, file_size)).bit_length())
            try:
                self._env = self._open_env(size)
            except (lmdb.CorruptedError, lmdb.InvalidError, lmdb.VersionMismatchError) as error:
                _log.warning("cache folder %s cannot be read (%s) and is replaced by an empty one", self._folder, error)
                for name in ("data.mdb", "lock.mdb"):
                    (self._folder / name).unlink(missing_ok=True)
                self._env = self._open_env(size)

    def _open_env(self, size: int) -> Any:
        # Without metasync a power failure may lose the last transaction, but never an earlier one or the file.
        env = lmdb.open(str(self._folder), map_size=size, max_dbs=2, metasync=False, max_readers=512, mode=0o600)
        try:
            env.reader_check()  # release old pages held by killed readers
            info, page = env.info(), env.stat()["psize"]
            if (self._folder / "data.mdb").stat().st_size < (info["last_pgno"] + 1) * page:  # else reading crashes
                raise lmdb.CorruptedError("the file is shorter than its header says")
            self._databases = {name: env.open_db(name) for name in _GENERATIONS}
        except BaseException:
            env.close()
            raise
        return env

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key, None if it is missing; all None until the tier is open."""
        env = self._env
        if env is None:
            return [None] * len(keys)
        values: list[bytes | None] = []
        with _errors(self._folder), env.begin() as read:
            young, old = self._order(read)
            for key in keys:
                if key == VOID_KEY:
                    values.append(read.get(key))
                    continue
                value = read.get(key, db=young)
                if value is None:
                    value = read.get(key, db=old)
                    if value is not None and len(self._promote) < _MAX_PROMOTED:
                        self._promote[key] = value
                values.append(value)
        return values

    def put_many(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        """Write all entries in one transaction, swapping the generations first if the young one is full."""
        self.open()
        promoted, self._promote = self._promote, {}
        entries = [*promoted.items(), *items]
        with _errors(self._folder):
            try:
                self._put(entries)
            except lmdb.MapFullError:  # pages can be reused only after the transaction that freed them
                with self._env.begin(write=True) as write:
                    self._swap_generations(write)
                self._put(entries)

    def void(self, origins: bytes) -> None:
        """Append to the value of VOID_KEY, which is outside of both generations."""
        self.open()
        with _errors(self._folder), self._env.begin(write=True) as write:
            write.put(VOID_KEY, (write.get(VOID_KEY) or b"") + origins)

    def stats(self) -> TierStats:
        """Number of entries by fingerprint, and bytes of their pages."""
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
        """Remove all entries, or those with ``fingerprint``. Returns how many were removed."""
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
        """Close the file."""
        with self._open:
            env, self._env = self._env, None
            if env is not None:
                env.close()

    def _order(self, transaction: Any) -> tuple[Any, Any]:
        """The databases of the young and the old generation."""
        first = transaction.get(_YOUNG) != _GENERATIONS[1]
        young, old = _GENERATIONS if first else _GENERATIONS[::-1]
        return self._databases[young], self._databases[old]

    def _put(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        with self._env.begin(write=True) as write:
            young, _ = self._order(write)
            if _bytes(write, young) > self._limit // 2:
                young = self._swap_generations(write)
            write.cursor(young).putmulti(sorted(items))

    def _swap_generations(self, write: Any) -> Any:
        """Empty the old generation, make it the young one and return it."""
        self._env.reader_check()  # as in _open_env
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
    """Convert LMDB's errors to TierError, with advice if possible."""
    try:
        yield
    except lmdb.MapResizedError as error:
        raise TierError(f"{folder} is open elsewhere with a larger `cache_disk_mb`; use the same value for both") from error
    except (lmdb.CorruptedError, lmdb.InvalidError, lmdb.VersionMismatchError) as error:
        raise TierError(f"{folder} is damaged or has another format version ({error}); delete the folder") from error
    except lmdb.Error as error:
        is_open_here = "already open in this process" in str(error)
        hint = "; engines in one process must share one cache: Engine(cache=...)" if is_open_here else ""
        raise TierError(f"{folder}: {error}{hint}") from error
    except OSError as error:
        raise TierError(f"{folder}: {error.strerror or error}; free up disk space, or change `cache_folder`") from error
