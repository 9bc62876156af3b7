"""The circuit breaker of one device and model, and its recovery steps: pure values, no clock, no threads.

closed: batches go to the device. open: none do, until ``until``. half-open: the device is probed with golden texts in the
background, so no request is ever used as the probe. Times are in time.monotonic() seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from npu_proxy.devices.failure import Failure


class Circuit(StrEnum):
    """State of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Recovery(StrEnum):
    """What to do before the next probe. In any case, the worker creates a new infer request after every error."""

    RECOMPILE = "recompile"
    """Drop every infer request, tensor and compiled model, unload the plugin, and compile again."""
    RESTART = "restart"
    """Kill the worker process and start a new one."""


AT_ONCE = frozenset({Failure.LOST, Failure.HANG, Failure.CRASH, Failure.NUMBERS, Failure.CANARY, Failure.COMPILE, Failure.ABSENT})
"""Failures that open the breaker on first occurrence."""
_SLOW = frozenset({Failure.COMPILE, Failure.ABSENT})
"""Failures that an early retry will not fix."""


@dataclass(frozen=True, kw_only=True)
class BreakerPolicy:
    """When a breaker opens, and for how long.

    failures: how many within ``window`` seconds open it. first, longest: initial and maximum backoff in seconds; slow: the
    maximum after a failed compilation or with an absent device. The backoff starts over after ``window`` seconds closed.
    """

    failures: int = 3
    window: float = 30.0
    first: float = 0.5
    longest: float = 30.0
    slow: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Breaker:
    """A snapshot of a breaker. opens: how often it opened without staying closed in between; determines backoff and recovery."""

    policy: BreakerPolicy = field(default_factory=BreakerPolicy)
    state: Circuit = Circuit.CLOSED
    recent: tuple[float, ...] = ()
    opens: int = 0
    until: float = 0.0
    closed_at: float = 0.0
    last: Failure | None = None

    def failed(self, failure: Failure, now: float, chance: float) -> Breaker:
        """The breaker after a failure. chance: a random number in [0, 1) for jitter."""
        if failure is Failure.BUSY or self.state is Circuit.OPEN:
            return self
        recent = (*(past for past in self.recent if now - past < self.policy.window), now)
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
        """The breaker while a probe runs."""
        return replace(self, state=Circuit.HALF_OPEN)

    def recovered(self, now: float) -> Breaker:
        """The breaker after a probe passed."""
        return replace(self, state=Circuit.CLOSED, recent=(), closed_at=now)

    @property
    def recovery(self) -> Recovery:
        """What to do before the next probe: recompile if an error in a batch opened it for the first time, otherwise restart."""
        in_place = self.last in (Failure.LOST, Failure.NUMBERS, Failure.CANARY, Failure.ERROR) and self.opens <= 1
        return Recovery.RECOMPILE if in_place else Recovery.RESTART

    @property
    def needs_operator(self) -> bool:
        """Whether to alert the operator: a recompilation and two restarts did not help. True only if ``opens`` is 4, 8, 16, ..."""
        return self.opens >= 4 and self.opens & (self.opens - 1) == 0


def backoff(policy: BreakerPolicy, failure: Failure, opens: int, chance: float) -> float:
    """Seconds until the next probe: doubles up to a maximum; the upper half is random so that devices do not return together."""
    longest = policy.slow if failure in _SLOW else policy.longest
    full = min(longest, policy.first * 2.0 ** min(opens - 1, 30))
    return full * (0.5 + chance / 2)
