"""How long the event loop stood still: while it does, the server answers nobody."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_EVERY = 0.05
_REMEMBERED = 60.0


class LoopLag(Collector):
    """The longest delay of a timer of the event loop in the last minute, as a metric."""

    def __init__(self) -> None:
        self._delays: deque[tuple[float, float]] = deque()
        """(time, seconds), each longer than all after it."""

    async def watch(self) -> None:
        """Measure until cancelled."""
        while True:
            due = time.monotonic() + _EVERY
            await asyncio.sleep(_EVERY)
            self.note(time.monotonic(), max(0.0, time.monotonic() - due))

    def note(self, now: float, seconds: float) -> None:
        """Note a delay."""
        while self._delays and self._delays[-1][1] <= seconds:
            self._delays.pop()
        self._delays.append((now, seconds))
        while self._delays[0][0] < now - _REMEMBERED:
            self._delays.popleft()

    @property
    def longest(self) -> float:
        """The longest delay in the last minute, in seconds."""
        return self._delays[0][1] if self._delays else 0.0

    def collect(self) -> Iterator[Metric]:
        """Return the metric."""
        words = "Longest time in the last minute that the event loop stood still, in seconds"
        yield GaugeMetricFamily("npu_proxy_event_loop_lag", words, value=self.longest)
