"""Which slots and batch shapes of a device were compared with golden texts, and when."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

WINDOW_SECONDS = 3600.0


class Examined(Generic[K]):
    """Times of examination by key, for example (slot, shape). Thread-safe in CPython: every operation is one on a dict."""

    def __init__(self, keys: Iterable[K] = ()) -> None:
        """All ``keys``, none of them examined yet."""
        self._times: dict[K, float] = dict.fromkeys(keys, float("-inf"))

    def next(self) -> K | None:
        """The key whose examination is longest ago; None if there are no keys."""
        return min(self._times, key=lambda key: self._times[key], default=None)

    def mark(self, key: K) -> None:
        """Record that a key, known or new, was examined now."""
        self._times[key] = time.monotonic()

    def drop(self, key: K) -> None:
        """Forget a key."""
        self._times.pop(key, None)

    def share(self) -> float:
        """The share of the keys that were examined in the last hour, from 0 to 1."""
        since = time.monotonic() - WINDOW_SECONDS
        times = list(self._times.values())
        return sum(seconds >= since for seconds in times) / len(times) if times else 0.0
