"""The vector cache: memory is read directly, disk and server in a separate lookup; a background thread writes to them.

A tier that fails, or is slower than computing, is bypassed for a while; its errors never fail a request.

Every entry carries its origin: the start of the device that computed it. When a device turns out to be wrong, all that it wrote
since that start is void, in every tier. Each tier keeps the void origins; processes that share it see them with their next lookup,
and otherwise within a second.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import cachetools

from npu_proxy.cache.entry import from_bytes, origins_from_bytes, origins_to_bytes, to_bytes
from npu_proxy.cache.tier import VOID_KEY, Pace, Tier, TierError
from npu_proxy.types import TextResult

_log = logging.getLogger("npu_proxy.cache")

_MAX_WAITING = 4096
"""Maximum number of entries waiting to be written; more are dropped. 4,096 vectors of 1,024 numbers are 17 MB."""
_BATCH = 1024
_IDLE = 0.5
"""Maximum seconds between checks whether to stop."""
_GATHER = 0.2
"""Seconds to collect entries for one transaction."""
_NOTICE = 0.05
"""Maximum seconds until void origins are written."""
_SHARE_SECONDS = 1.0
"""How often a process looks for void origins that others have found."""
_CLOSE_SECONDS = 10.0
_TOUCH_INTERVAL = 64
"""Of this many requests with vectors in memory, one has them written to the tiers again."""


@dataclass(slots=True)
class CacheCounts:
    """Vectors found (by tier) and not found; entries written and dropped; errors; lookups bypassed; entries and bytes in memory.

    voided: entries that were found, or were in memory, and were void.
    """

    hits: dict[str, int]
    misses: int = 0
    written: int = 0
    dropped: int = 0
    errors: int = 0
    bypassed: int = 0
    voided: int = 0
    entries: int = 0
    size: int = 0


def _size(entry: TextResult) -> int:
    """Approximate bytes in memory: the vector and Python's overhead for it and its key."""
    return entry.vector.nbytes + 500


class VectorCache:
    """A cache that the engines of a process share. Thread-safe. ``recall`` never blocks, ``fetch`` may take milliseconds."""

    def __init__(self, *, memory: int, tiers: Sequence[Tier] = ()) -> None:
        """memory: limit in bytes. tiers: in order of lookup."""
        self._lock = threading.Lock()
        self._memory: cachetools.LRUCache[bytes, TextResult] = cachetools.LRUCache(memory, getsizeof=_size)
        self._tiers = tiers
        self._reading = {tier.name: Pace() for tier in tiers}
        self._writing = {tier.name: Pace() for tier in tiers}
        self._counts = CacheCounts(dict.fromkeys(("memory", *self._reading), 0))
        self._queue: queue.Queue[tuple[bytes, TextResult, str]] = queue.Queue(_MAX_WAITING)
        self._since_touch = 0
        self._void: frozenset[int] = frozenset()
        self._void_in: dict[str, frozenset[int]] = {tier.name: frozenset() for tier in tiers}
        """Void origins that each tier is known to have."""
        self._stopping = threading.Event()
        self._wake = threading.Event()
        """Set when void origins are to be written to the tiers."""
        self._writer: threading.Thread | None = None
        if tiers:
            self._writer = threading.Thread(target=self._write, name="npu-proxy-cache", daemon=True)
            self._writer.start()

    @property
    def has_tiers(self) -> bool:
        """Whether there are tiers behind memory, so that ``fetch`` may find vectors that ``recall`` did not."""
        return bool(self._tiers)

    def recall(self, keys: Sequence[bytes]) -> list[TextResult | None]:
        """The vectors in memory; None for each key that is not."""
        with self._lock:
            found = [self._memory.get(key) for key in keys]
            hits = len(found) - found.count(None)
            self._counts.hits["memory"] += hits
            if not self._tiers:
                self._counts.misses += len(found) - hits
        if self._tiers and hits:
            self._touch(keys, found)
        return found

    def _touch(self, keys: Sequence[bytes], found: Sequence[TextResult | None]) -> None:
        """Write some hits to the tiers again; the tiers do not see memory hits, and would evict the vectors used most."""
        self._since_touch += 1
        if self._since_touch < _TOUCH_INTERVAL:
            return
        self._since_touch = 0
        for key, entry in zip(keys, found, strict=True):
            if entry is not None:
                self._queue_write(key, entry, "")

    def fetch(
        self, keys: Sequence[bytes], compute_seconds: float, fits: Callable[[TextResult], bool] = lambda _: True
    ) -> list[TextResult | None]:
        """The vectors in the tiers behind memory, None if missing. compute_seconds: device time per text; 0 if unknown.

        fits: whether an entry can be the model's; any other counts as missing, whoever wrote it.
        """
        found: list[TextResult | None] = [None] * len(keys)
        for tier in self._tiers:
            missing = [index for index, entry in enumerate(found) if entry is None]
            if not missing:
                break
            values = self._read_from(tier, [keys[index] for index in missing], compute_seconds)
            for index, value in zip(missing, values, strict=True):
                entry = from_bytes(value) if value is not None else None
                if entry is not None and self._is_void(entry):
                    continue
                if entry is not None and not fits(entry):
                    self._misfit(tier)
                    continue
                if entry is not None:
                    found[index] = entry
                    self._remember(keys[index], entry, tier.name)
        with self._lock:
            self._counts.misses += found.count(None)
        return found

    def _misfit(self, tier: Tier) -> None:
        _log.warning("cache tier %s has a vector that cannot be this model's; it is computed again", tier.name)
        with self._lock:
            self._counts.errors += 1

    def keep(self, key: bytes, entry: TextResult) -> None:
        """Store a new vector; never blocks."""
        self._remember(key, entry, "")

    def void(self, origins: Iterable[int]) -> None:
        """Make all entries of these origins void: in memory now, in the tiers as soon as the writer thread gets there."""
        with self._lock:
            new = frozenset(origins) - self._void - {0}
            if not new:
                return
            self._void |= new
            gone = [key for key, entry in self._memory.items() if entry.origin in new]
            for key in gone:
                del self._memory[key]
            self._counts.voided += len(gone)
        _log.warning("vectors of a device that was wrong are void: %d in memory, and all that it wrote elsewhere", len(gone))
        self._wake.set()

    def counts(self) -> CacheCounts:
        """A consistent copy of the counts."""
        with self._lock:
            counts = self._counts
            return CacheCounts(
                hits=dict(counts.hits),
                misses=counts.misses,
                written=counts.written,
                dropped=counts.dropped,
                errors=counts.errors,
                bypassed=counts.bypassed,
                voided=counts.voided,
                entries=len(self._memory),
                size=int(self._memory.currsize),
            )

    def close(self) -> None:
        """Write the waiting entries, then close the tiers; gives up after ten seconds if a tier hangs."""
        self._stopping.set()
        if self._writer is not None:
            self._writer.join(_CLOSE_SECONDS)
            if self._writer.is_alive():
                _log.warning("a cache tier did not finish writing within %g seconds; unwritten vectors are lost", _CLOSE_SECONDS)
                return
        for tier in self._tiers:
            tier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _remember(self, key: bytes, entry: TextResult, origin: str) -> None:
        """Store in memory, and queue for the tiers before ``origin`` (for all tiers if the vector is new)."""
        with self._lock:
            if entry.origin in self._void:  # it was being computed, or read, when its device was found to be wrong
                self._counts.voided += 1
                return
            if _size(entry) <= self._memory.maxsize:
                self._memory[key] = entry
            if origin:
                self._counts.hits[origin] += 1
        if self._tiers and origin != self._tiers[0].name:
            self._queue_write(key, entry, origin)

    def _queue_write(self, key: bytes, entry: TextResult, origin: str) -> None:
        try:
            self._queue.put_nowait((key, entry, origin))
        except queue.Full:
            with self._lock:
                self._counts.dropped += 1

    def _read_from(self, tier: Tier, keys: Sequence[bytes], compute_seconds: float) -> Sequence[bytes | None]:
        no_values: list[bytes | None] = [None] * len(keys)
        start = time.monotonic()
        pace = self._reading[tier.name]
        if pace.rests(start):
            with self._lock:
                self._counts.bypassed += len(keys)
            return no_values
        try:
            *values, void = tier.get_many([*keys, VOID_KEY])
            self._learn(tier, void)
        except Exception as error:  # a tier must not fail a request, whatever its library raises
            self._failed(self._reading, tier, error)
            return no_values
        now = time.monotonic()
        self._reading[tier.name] = pace.looked_up(seconds=now - start, texts=len(keys), compute_seconds=compute_seconds, now=now)
        return values

    def _is_void(self, entry: TextResult) -> bool:
        if entry.origin not in self._void:
            return False
        with self._lock:
            self._counts.voided += 1
        return True

    def _learn(self, tier: Tier, value: bytes | None) -> None:
        """Take over the void origins that a tier has."""
        if value is None and not self._void:
            return
        found = origins_from_bytes(value)
        self._void_in[tier.name] = found
        self.void(found)
        if self._void - found:
            self._wake.set()  # the tier has lost some, or never had them

    def _share_voids(self) -> None:
        """Exchange void origins with every tier. Called by the writer thread."""
        for tier in self._tiers:
            if self._writing[tier.name].rests(time.monotonic()):
                continue
            try:
                self._learn(tier, tier.get_many([VOID_KEY])[0])
                missing = self._void - self._void_in[tier.name]
                if missing:
                    tier.void(origins_to_bytes(missing))
                    self._void_in[tier.name] |= missing
            except Exception as error:  # as in _read_from
                self._failed(self._writing, tier, error)

    def _failed(self, paces: dict[str, Pace], tier: Tier, error: Exception) -> None:
        now = time.monotonic()
        action = "reading" if paces is self._reading else "writing"
        paces[tier.name] = pace = paces[tier.name].failed(now)
        reason = error if isinstance(error, TierError) else f"{type(error).__name__}: {error}"
        _log.warning("%s cache: %s failed: %s; bypassed for %.0f seconds", tier.name, action, reason, pace.rests_until - now)
        with self._lock:
            self._counts.errors += 1

    def _write(self) -> None:
        """The writer thread: collects entries and writes them to each tier."""
        for tier in self._tiers:
            try:
                tier.open()
            except Exception as error:  # as in _read_from
                self._failed(self._writing, tier, error)
        shared = 0.0
        while True:
            if self._wake.is_set() or time.monotonic() - shared > _SHARE_SECONDS:
                self._wake.clear()
                self._share_voids()
                shared = time.monotonic()
            batch = self._gather()
            if batch:
                for tier in self._tiers:
                    self._write_to(tier, batch)
            elif self._stopping.is_set():
                if self._wake.is_set():
                    self._share_voids()
                return

    def _gather(self) -> list[tuple[bytes, TextResult, str]]:
        """Collect the next entries: waits for a first one, then briefly for more; does not wait when stopping."""
        batch: list[tuple[bytes, TextResult, str]] = []
        end = time.monotonic() + _IDLE
        while len(batch) < _BATCH:
            try:
                timeout = 0.0 if self._stopping.is_set() else max(0.0, end - time.monotonic())
                batch.append(self._queue.get(block=timeout > 0, timeout=min(timeout, _NOTICE)))
            except queue.Empty:
                if self._wake.is_set() or self._stopping.is_set() or time.monotonic() >= end:
                    break
                continue
            if len(batch) == 1:
                end = time.monotonic() + _GATHER
        return batch

    def _write_to(self, tier: Tier, batch: Sequence[tuple[bytes, TextResult, str]]) -> None:
        names = [other.name for other in self._tiers]
        position = names.index(tier.name)
        fresh = {key: entry for key, entry, origin in batch if not origin or names.index(origin) > position}
        entries = {key: entry for key, entry in fresh.items() if entry.origin not in self._void}
        if not entries or self._writing[tier.name].rests(time.monotonic()):
            self._count_written(0, len(entries))
            return
        try:
            tier.put_many([(key, to_bytes(entry)) for key, entry in entries.items()])
        except Exception as error:  # as in _read_from
            self._failed(self._writing, tier, error)
            self._count_written(0, len(entries))
        else:
            self._writing[tier.name] = Pace()
            self._count_written(len(entries), 0)

    def _count_written(self, written: int, dropped: int) -> None:
        with self._lock:
            self._counts.written += written
            self._counts.dropped += dropped
