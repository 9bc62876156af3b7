"""The slots of a device: each computes one batch at a time and has a graph, or infer requests, of its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

S = TypeVar("S")
_MEMORY_SHARE = 4
"""By default, the copies of the weights take up to a quarter of the memory."""


def slots_that_fit(wanted: int, weight_bytes: int, memory: int) -> int:
    """How many slots to use by default: each holds another copy of the weights, in the layout that its graph needs."""
    return max(1, min(wanted, memory // _MEMORY_SHARE // max(1, weight_bytes)))


@dataclass(eq=False)
class _Waiter(Generic[S]):
    """A thread that waits for any slot, or for a certain one."""

    wanted: S | None
    slot: S | None = None
    woken: threading.Event = field(default_factory=threading.Event)


class SlotPool(Generic[S]):
    """The slots that are free. Thread-safe; threads get slots in the order in which they ask, but for a certain one, at once."""

    def __init__(self) -> None:
        self._free: list[S] = []
        self._waiters: list[_Waiter[S]] = []
        self._closed = False
        self._lock = threading.Lock()

    def put(self, slot: S) -> None:
        """Add a slot, or give it back."""
        with self._lock:
            for waiter in sorted(self._waiters, key=lambda waiter: waiter.wanted is None):
                if waiter.wanted is None or waiter.wanted is slot:
                    waiter.slot = slot
                    self._waiters.remove(waiter)
                    waiter.woken.set()  # no other thread wakes: they would take processor time from the inferences
                    return
            self._free.append(slot)

    def take(self, seconds: float, wanted: S | None = None) -> S | None:
        """Take the slot used last, or a certain one. Returns None after ``seconds`` or if the pool is closed."""
        with self._lock:
            if self._closed:
                return None
            for slot in reversed(self._free):
                if wanted is None or wanted is slot:
                    self._free.remove(slot)
                    return slot
            waiter = _Waiter(wanted)
            self._waiters.append(waiter)
        waiter.woken.wait(max(0.0, seconds))
        with self._lock:
            if waiter in self._waiters:  # neither a slot nor the end of the pool
                self._waiters.remove(waiter)
            return waiter.slot

    @property
    def closed(self) -> bool:
        """Whether the pool is closed."""
        return self._closed

    def close(self) -> None:
        """Wake every thread that waits for a slot."""
        with self._lock:
            self._closed = True
            for waiter in self._waiters:
                waiter.woken.set()
            self._waiters.clear()


def agreeing(similar: Sequence[Sequence[bool]]) -> list[int]:
    """The indices of the largest group that agrees with one of its members, where ``similar[a][b]`` says if a agrees with b.

    Of equally large groups, the one with the lowest index. An item agrees with itself.
    """
    groups = [[b for b, same in enumerate(row) if same or a == b] for a, row in enumerate(similar)]
    return max(groups, key=len, default=[])
