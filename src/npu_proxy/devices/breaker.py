"""The circuit breaker of one device and model, and the ladder of recovery: pure values, no clock, no threads.

closed: rows go to the device. open: none do, until ``until``. half-open: golden texts are tried in the background, so no
request is ever the probe. Seconds are time.monotonic().
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from npu_proxy.devices.failure import Failure


class Circuit(StrEnum):
    """Where a breaker stands."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Rung(StrEnum):
    """What is tried before the next probe; a new infer request after an error is the worker's own first rung."""

    RECOMPILE = "recompile"
    """Drop every request, tensor and compiled model, unload the plugin, compile again."""
    RESTART = "restart"
    """Kill the worker process and start a new one."""


AT_ONCE = frozenset({Failure.LOST, Failure.HANG, Failure.CRASH, Failure.NUMBERS, Failure.COMPILE, Failure.ABSENT})
"""Failures that open the breaker the first time."""
_SLOW = frozenset({Failure.COMPILE, Failure.ABSENT})
"""Failures that trying again soon will not cure."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When a breaker opens, and for how long.

    failures: how many within ``window`` seconds open it. first, longest: seconds of backoff; slow: the longest after a
    failed compilation or an absent device. Closed for ``window`` seconds without opening, the backoff starts anew.
    """

    failures: int = 3
    window: float = 30.0
    first: float = 0.5
    longest: float = 30.0
    slow: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Breaker:
    """A moment of a breaker. opens: how often it opened without staying closed in between; it sets backoff and rung."""

    policy: Policy = field(default_factory=Policy)
    state: Circuit = Circuit.CLOSED
    recent: tuple[float, ...] = ()
    opens: int = 0
    until: float = 0.0
    closed_at: float = 0.0
    last: Failure | None = None

    def failed(self, failure: Failure, now: float, chance: float) -> Breaker:
        """After a failure. chance: a random number in [0, 1) for the jitter."""
        if failure is Failure.BUSY or self.state is Circuit.OPEN:
            return self
        recent = (*(moment for moment in self.recent if now - moment < self.policy.window), now)
        if self.state is Circuit.CLOSED and failure not in AT_ONCE and len(recent) < self.policy.failures:
            return replace(self, recent=recent, last=failure)
        calm = self.state is Circuit.CLOSED and now - self.closed_at >= self.policy.window
        opens = 1 if calm else self.opens + 1
        return replace(
            self,
            state=Circuit.OPEN,
            recent=(),
            opens=opens,
            until=now + backoff(self.policy, failure, opens, chance),
            last=failure,
        )

    def probing(self) -> Breaker:
        """A probe begins."""
        return replace(self, state=Circuit.HALF_OPEN)

    def recovered(self, now: float) -> Breaker:
        """A probe passed."""
        return replace(self, state=Circuit.CLOSED, recent=(), closed_at=now)

    @property
    def rung(self) -> Rung:
        """What to try before the next probe: recompile once after an error, else a new process."""
        in_place = self.last in (Failure.LOST, Failure.NUMBERS, Failure.ERROR) and self.opens <= 1
        return Rung.RECOMPILE if in_place else Rung.RESTART

    @property
    def hopeless(self) -> bool:
        """Whether to tell the operator: a recompilation and two restarts did not help. True at each doubling, not always."""
        return self.opens >= 4 and self.opens & (self.opens - 1) == 0


def backoff(policy: Policy, failure: Failure, opens: int, chance: float) -> float:
    """Seconds until the next probe: doubling, capped, the upper half of it random so that many do not return at once."""
    longest = policy.slow if failure in _SLOW else policy.longest
    full = min(longest, policy.first * 2.0 ** min(opens - 1, 30))
    return full * (0.5 + chance / 2)
