"""Vectors on a Valkey or Redis server shared by several machines. The server's configuration sets its limit and eviction."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from npu_proxy.cache.entry import FINGERPRINT_BYTES, fingerprint_bytes
from npu_proxy.cache.tier import VOID_KEY, TierError, TierStats
from npu_proxy.errors import SettingsError

_TIMEOUT = 0.25
"""Seconds; a slower lookup is not worth waiting for, and the tier is bypassed for a while."""
_SCAN = 1000


class SharedTier:
    """Stores entries on the server at ``url`` with the key prefix `npu-proxy:PREFIX:`."""

    name = "shared"

    def __init__(self, url: str, prefix: str) -> None:
        """Connects on first use. Raises SettingsError if ``url`` is invalid or the client library is missing."""
        try:
            import redis
        except ImportError as error:
            raise SettingsError("`cache_url` needs redis: pip install 'npu-proxy[shared-cache]'", param="cache_url") from error
        self._prefix = f"npu-proxy:{prefix}:".encode()
        self._errors: type[Exception] = redis.RedisError
        try:
            self._client: Any = redis.Redis.from_url(
                url.replace("valkey", "redis", 1) if url.startswith("valkey") else url,
                socket_timeout=_TIMEOUT,
                socket_connect_timeout=_TIMEOUT,
            )
        except ValueError as error:
            raise SettingsError(f"`cache_url`: {error}", param="cache_url") from error

    def open(self) -> None:
        """Check that the server responds. Raises TierError."""
        with self._as_tier_error():
            self._client.ping()

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key, None if it is missing; in one round trip."""
        with self._as_tier_error():
            return self._client.mget([self._prefix + key for key in keys])

    def put_many(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        """Write all entries in one round trip."""
        with self._as_tier_error():
            self._client.mset({self._prefix + key: value for key, value in items})

    def void(self, origins: bytes) -> None:
        """Append to the value of VOID_KEY. If the server evicts it, whoever knows it appends it again."""
        with self._as_tier_error():
            self._client.append(self._prefix + VOID_KEY, origins)

    def stats(self) -> TierStats:
        """Number of entries by fingerprint. The size is 0, since the server does not report it per prefix."""
        entries: dict[str, int] = {}
        with self._as_tier_error():
            for name in self._names(b"*"):
                if name == self._prefix + VOID_KEY:
                    continue
                fingerprint = name[len(self._prefix) :][:FINGERPRINT_BYTES].decode("ascii", "replace")
                entries[fingerprint] = entries.get(fingerprint, 0) + 1
        return TierStats(name=self.name, entries=entries, size=0, limit=0)

    def clear(self, fingerprint: str | None) -> int:
        """Remove all entries with this prefix, or those with ``fingerprint``. Returns how many were removed."""
        removed, batch = 0, list[bytes]()
        with self._as_tier_error():
            for name in self._names(b"*" if fingerprint is None else _escaped(fingerprint_bytes(fingerprint)) + b"*"):
                batch.append(name)
                if len(batch) == _SCAN:
                    removed += self._client.delete(*batch)
                    batch.clear()
            return removed + (self._client.delete(*batch) if batch else 0)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _names(self, pattern: bytes) -> Iterator[bytes]:
        return self._client.scan_iter(match=_escaped(self._prefix) + pattern, count=_SCAN)

    @contextmanager
    def _as_tier_error(self) -> Generator[None]:
        try:
            yield
        except (self._errors, OSError) as error:
            raise TierError(f"the server at `cache_url` failed: {error}") from error


def _escaped(name: bytes) -> bytes:
    """Escape a name for use in a glob pattern."""
    return b"".join(b"\\" + bytes([byte]) if byte in b"*?[]\\^-" else bytes([byte]) for byte in name)
