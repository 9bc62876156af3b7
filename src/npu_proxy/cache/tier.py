"""What the cache asks of a place that is slower than memory, and when it is better left alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from npu_proxy.errors import NpuProxyError

FIRST_REST, LONGEST_REST = 1.0, 60.0
"""Seconds a tier is left alone after a failure, doubled with each further one."""
LOOK_AGAIN = 5.0
"""Seconds after which a tier that was slower than computing is tried again."""
_WEIGHT = 0.2
"""Share of the newest lookup in the mean."""


class TierError(NpuProxyError):
    """A tier could not read or write; the message says why and what helps."""

    kind = "cache"


@dataclass(frozen=True, kw_only=True)
class TierStats:
    """What lies in a tier: entries by fingerprint, bytes, and how many bytes there may be (0: the server decides)."""

    name: str
    entries: dict[str, int]
    size: int
    limit: int


class Tier(Protocol):
    """Keeps bytes by key. ``get_many`` may be called by one thread while another writes; every call has a time limit."""

    @property
    def name(self) -> str: ...

    def open(self) -> None:
        """Make ready; called by the writer, which may wait. Until then nothing is found. Raises TierError."""
        ...

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values, None where there is none. Raises TierError."""
        ...

    def put_many(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        """Keep all of them, or none of them and raise TierError."""
        ...

    def stats(self) -> TierStats:
        """What is there. Raises TierError."""
        ...

    def clear(self, fingerprint: str | None) -> int:
        """Remove all entries, or those of one model; how many there were. Raises TierError."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How reading from a tier, or writing to it, has gone.

    seconds: a text of its lookups. failures: in a row. rests_until: time.monotonic() seconds until it is asked again.
    """

    seconds: float = 0.0
    failures: int = 0
    rests_until: float = -math.inf

    def rests(self, now: float) -> bool:
        """Whether to leave it alone at this moment."""
        return now < self.rests_until

    def looked_up(self, *, seconds: float, texts: int, compute_seconds: float, now: float) -> Pace:
        """After a lookup. compute_seconds: what a text costs on the device; slower than that, the tier rests for a while."""
        one = seconds / max(1, texts)
        mean = one if not self.seconds else (1 - _WEIGHT) * self.seconds + _WEIGHT * one
        if 0 < compute_seconds < mean:
            return Pace(seconds=0.0, rests_until=now + LOOK_AGAIN)
        return Pace(seconds=mean)

    def failed(self, now: float) -> Pace:
        """After an error or a lookup that took too long."""
        rest = min(LONGEST_REST, FIRST_REST * 2**self.failures)
        return replace(self, failures=self.failures + 1, rests_until=now + rest)
