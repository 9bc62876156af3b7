"""The interface of a cache tier that is slower than memory, and when such a tier is bypassed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from npu_proxy.errors import NpuProxyError

FIRST_REST, LONGEST_REST = 1.0, 60.0
"""Seconds that a tier is bypassed after a failure: the first, doubled with each further failure, and the maximum."""
LOOK_AGAIN = 5.0
"""Seconds that a tier is bypassed after it was slower than computing."""
_WEIGHT = 0.2
"""Weight of the latest lookup in the moving average."""


class TierError(NpuProxyError):
    """A tier could not read or write; the message says why and what to do."""

    kind = "cache"


@dataclass(frozen=True, kw_only=True)
class TierStats:
    """Contents of a tier. entries: number by fingerprint. size, limit: bytes; a limit of 0 means that the server decides."""

    name: str
    entries: dict[str, int]
    size: int
    limit: int


VOID_KEY = b"void"
"""The key of the origins whose entries are void (cache/vectors.py). It is kept when entries are evicted."""


class Tier(Protocol):
    """Stores bytes by key. ``get_many`` may be called while another thread writes; every call has a time limit."""

    @property
    def name(self) -> str: ...

    def open(self) -> None:
        """Prepare the tier. Called by the writer thread, which may wait; until then no key is found. Raises TierError."""
        ...

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key, None if it is missing. Raises TierError."""
        ...

    def put_many(self, items: Sequence[tuple[bytes, bytes]]) -> None:
        """Write all entries, or none of them and raise TierError."""
        ...

    def void(self, origins: bytes) -> None:
        """Append to the value of VOID_KEY, which ``get_many`` returns like any other. Raises TierError."""
        ...

    def stats(self) -> TierStats:
        """The contents of the tier. Raises TierError."""
        ...

    def clear(self, fingerprint: str | None) -> int:
        """Remove all entries, or those with ``fingerprint``. Returns how many were removed. Raises TierError."""
        ...

    def close(self) -> None:
        """Close files and connections."""
        ...


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Recent performance of reading from a tier, or of writing to it.

    seconds: mean per vector looked up. failures: consecutive failures. rests_until: time.monotonic() seconds until which the
    tier is bypassed.
    """

    seconds: float = 0.0
    failures: int = 0
    rests_until: float = -math.inf

    def rests(self, now: float) -> bool:
        """Whether the tier is bypassed at ``now``."""
        return now < self.rests_until

    def looked_up(self, *, seconds: float, texts: int, compute_seconds: float, now: float) -> Pace:
        """The pace after a lookup. compute_seconds: device time per text; a tier slower than that is bypassed for a while."""
        per_text = seconds / max(1, texts)
        mean = per_text if not self.seconds else (1 - _WEIGHT) * self.seconds + _WEIGHT * per_text
        if 0 < compute_seconds < mean:
            return Pace(seconds=0.0, rests_until=now + LOOK_AGAIN)
        return Pace(seconds=mean)

    def failed(self, now: float) -> Pace:
        """The pace after an error or a timeout."""
        rest = min(LONGEST_REST, FIRST_REST * 2**self.failures)
        return replace(self, failures=self.failures + 1, rests_until=now + rest)
