"""The tiers as one cache: memory at once, disk and server in a lookup of their own, all writing in a thread behind.

A tier that fails, or is slower than computing, is left alone for a while; nothing of it is ever an error of a request.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import cachetools

from npu_proxy.cache.disk import DiskTier
from npu_proxy.cache.entry import from_bytes, to_bytes
from npu_proxy.cache.shared import SharedTier
from npu_proxy.cache.tier import Pace, Tier, TierError
from npu_proxy.types import Embedded

log = logging.getLogger("npu_proxy.cache")

_WAITING = 4096
"""Entries that wait to be written; more are not kept. 4,096 vectors of 1,024 numbers are 17 MB."""
_BATCH = 1024
_IDLE = 0.5
"""Seconds between looks whether to stop."""
_GATHER = 0.2
"""Seconds in which entries gather for one transaction."""
_CLOSE_SECONDS = 10.0
_TOUCH = 64
"""Of so many requests that memory answers, one is written again."""


@dataclass(slots=True)
class Counts:
    """Texts found and not found, a tier; entries written and given up; errors; and what lies in memory."""

    hits: dict[str, int]
    misses: int = 0
    written: int = 0
    dropped: int = 0
    errors: int = 0
    bypassed: int = 0
    entries: int = 0
    size: int = 0


def _size(entry: Embedded) -> int:
    """Bytes in memory, about: the vector and what Python needs around it and its key."""
    return entry.vector.nbytes + 500


class VectorCache:
    """One for a process, shared by its engines. Thread-safe. ``recall`` never blocks, ``fetch`` may take milliseconds."""

    def __init__(self, *, memory: int, tiers: Sequence[Tier] = ()) -> None:
        """memory: bytes. tiers: from the nearest to the farthest."""
        self._lock = threading.Lock()
        self._memory: cachetools.LRUCache[bytes, Embedded] = cachetools.LRUCache(memory, getsizeof=_size)
        self._tiers = tiers
        self._reading = {tier.name: Pace() for tier in tiers}
        self._writing = {tier.name: Pace() for tier in tiers}
        self._counts = Counts(dict.fromkeys(("memory", *self._reading), 0))
        self._queue: queue.Queue[tuple[bytes, Embedded, str]] = queue.Queue(_WAITING)
        self._since_touch = 0
        self._stopping = threading.Event()
        self._writer: threading.Thread | None = None
        if tiers:
            self._writer = threading.Thread(target=self._write, name="npu-proxy-cache", daemon=True)
            self._writer.start()

    @property
    def deep(self) -> bool:
        """Whether there is more than memory, so that ``fetch`` can find what ``recall`` did not."""
        return bool(self._tiers)

    def recall(self, keys: Sequence[bytes]) -> list[Embedded | None]:
        """What lies in memory."""
        with self._lock:
            found = [self._memory.get(key) for key in keys]
            hits = len(found) - found.count(None)
            self._counts.hits["memory"] += hits
            if not self._tiers:
                self._counts.misses += len(found) - hits
        if self._tiers and hits:
            self._touch(keys, found)
        return found

    def _touch(self, keys: Sequence[bytes], found: Sequence[Embedded | None]) -> None:
        """Write one in so many hits again: the tiers do not see what memory answers, and would forget what is used most."""
        self._since_touch += 1
        if self._since_touch < _TOUCH:
            return
        self._since_touch = 0
        for key, entry in zip(keys, found, strict=True):
            if entry is not None:
                self._hand_over(key, entry, "")

    def fetch(self, keys: Sequence[bytes], compute_seconds: float) -> list[Embedded | None]:
        """What lies in the tiers behind memory. compute_seconds: what a text costs on the device; 0 where unknown."""
        found: list[Embedded | None] = [None] * len(keys)
        for tier in self._tiers:
            left = [index for index, entry in enumerate(found) if entry is None]
            if not left:
                break
            values = self._look(tier, [keys[index] for index in left], compute_seconds)
            for index, value in zip(left, values, strict=True):
                entry = from_bytes(value) if value is not None else None
                if entry is not None:
                    found[index] = entry
                    self._remember(keys[index], entry, tier.name)
        with self._lock:
            self._counts.misses += found.count(None)
        return found

    def keep(self, key: bytes, entry: Embedded) -> None:
        """Remember a new vector; never waits."""
        self._remember(key, entry, "")

    def counts(self) -> Counts:
        """A consistent copy."""
        with self._lock:
            now = self._counts
            return Counts(
                hits=dict(now.hits),
                misses=now.misses,
                written=now.written,
                dropped=now.dropped,
                errors=now.errors,
                bypassed=now.bypassed,
                entries=len(self._memory),
                size=int(self._memory.currsize),
            )

    def close(self) -> None:
        """Write what waits, then let go; a tier that hangs is left behind after ten seconds."""
        self._stopping.set()
        if self._writer is not None:
            self._writer.join(_CLOSE_SECONDS)
            if self._writer.is_alive():
                log.warning("a cache tier did not finish writing within %g seconds; what waited is lost", _CLOSE_SECONDS)
                return
        for tier in self._tiers:
            tier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _remember(self, key: bytes, entry: Embedded, origin: str) -> None:
        """Into memory at once, and to the writer for the tiers before ``origin`` (all of them for a new vector)."""
        with self._lock:
            if _size(entry) <= self._memory.maxsize:
                self._memory[key] = entry
            if origin:
                self._counts.hits[origin] += 1
        if self._tiers and origin != self._tiers[0].name:
            self._hand_over(key, entry, origin)

    def _hand_over(self, key: bytes, entry: Embedded, origin: str) -> None:
        try:
            self._queue.put_nowait((key, entry, origin))
        except queue.Full:
            with self._lock:
                self._counts.dropped += 1

    def _look(self, tier: Tier, keys: Sequence[bytes], compute_seconds: float) -> Sequence[bytes | None]:
        nothing: list[bytes | None] = [None] * len(keys)
        start = time.monotonic()
        pace = self._reading[tier.name]
        if pace.rests(start):
            with self._lock:
                self._counts.bypassed += len(keys)
            return nothing
        try:
            found = tier.get_many(keys)
        except Exception as error:  # no tier may be a request's trouble, whatever its library raises
            self._failed(self._reading, tier, error)
            return nothing
        now = time.monotonic()
        self._reading[tier.name] = pace.looked_up(seconds=now - start, texts=len(keys), compute_seconds=compute_seconds, now=now)
        return found

    def _failed(self, paces: dict[str, Pace], tier: Tier, error: Exception) -> None:
        now = time.monotonic()
        what = "reading" if paces is self._reading else "writing"
        paces[tier.name] = pace = paces[tier.name].failed(now)
        words = error if isinstance(error, TierError) else f"{type(error).__name__}: {error}"
        log.warning("cache %s, %s: %s; it rests for %.0f seconds", tier.name, what, words, pace.rests_until - now)
        with self._lock:
            self._counts.errors += 1

    def _write(self) -> None:
        """The writer's thread: gathers, and writes a batch to each tier."""
        for tier in self._tiers:
            try:
                tier.open()
            except Exception as error:  # as in _look
                self._failed(self._writing, tier, error)
        while True:
            batch = self._gather()
            if batch:
                for tier in self._tiers:
                    self._write_to(tier, batch)
            elif self._stopping.is_set():
                return

    def _gather(self) -> list[tuple[bytes, Embedded, str]]:
        """What came since the last batch: waits for a first entry, then a moment for more, and not at all when stopping."""
        batch: list[tuple[bytes, Embedded, str]] = []
        end = time.monotonic() + _IDLE
        while len(batch) < _BATCH:
            try:
                left = 0.0 if self._stopping.is_set() else max(0.0, end - time.monotonic())
                batch.append(self._queue.get(block=left > 0, timeout=left))
            except queue.Empty:
                break
            if len(batch) == 1:
                end = time.monotonic() + _GATHER
        return batch

    def _write_to(self, tier: Tier, batch: Sequence[tuple[bytes, Embedded, str]]) -> None:
        names = [one.name for one in self._tiers]
        own = names.index(tier.name)
        wanted = {key: entry for key, entry, origin in batch if not origin or names.index(origin) > own}
        if not wanted or self._writing[tier.name].rests(time.monotonic()):
            self._count_written(0, len(wanted))
            return
        try:
            tier.put_many([(key, to_bytes(entry)) for key, entry in wanted.items()])
        except Exception as error:  # as in _look
            self._failed(self._writing, tier, error)
            self._count_written(0, len(wanted))
        else:
            self._writing[tier.name] = Pace()
            self._count_written(len(wanted), 0)

    def _count_written(self, written: int, dropped: int) -> None:
        with self._lock:
            self._counts.written += written
            self._counts.dropped += dropped


def open_tiers(*, disk: int, folder: Path, url: str, prefix: str) -> list[Tier]:
    """The tiers behind memory that the settings name. disk: bytes, 0 for none; url: "" for none. Raises SettingsError."""
    tiers: list[Tier] = []
    if disk:
        tiers.append(DiskTier(folder, disk))
    if url:
        tiers.append(SharedTier(url, prefix))
    return tiers
