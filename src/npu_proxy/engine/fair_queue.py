"""A queue in which clients take turns by tokens, and each client's own items go by lane, size and age. Data and decisions only.

Between clients: start-time fair queueing. Each client has a clock, which each started item moves forward by its tokens divided by
the client's weight; the client whose clock is furthest behind is next. So clients that always have something waiting get equal
shares, however many requests they have open, and one that sends little never waits for the backlog of another.

Within a client: the interactive lane first, then smaller requests, in order of arrival among requests of similar size; but at
least every ``aging`` seconds its oldest item goes first, so that none starves.

Source: Goyal, Vin and Cheng 1996 (start-time fair queueing).
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Generic, TypeVar

from npu_proxy.types import Client, Lane

_CREDIT = 4096
"""Tokens of its share that a client may catch up on if it had nothing waiting for a moment, as between two requests."""
_REMEMBERED = 1024
"""Number of clients without waiting items whose clocks are kept."""

Rank = tuple[bool, int]
"""Order within a client: whether the request is in the bulk lane, and its size class; the lowest goes first."""

Item = TypeVar("Item", bound=Hashable)


def rank_of(lane: Lane, tokens: int) -> Rank:
    """The rank of a request. tokens: of all its texts; requests whose sizes differ by less than a factor of 4 are often equal."""
    return (lane is Lane.BULK, tokens.bit_length() // 2)


@dataclass(frozen=True, slots=True)
class _Entry:
    client: str
    rank: Rank
    tokens: int
    since: float


@dataclass(slots=True)
class _Clock(Generic[Item]):
    """A client's share: its clock, and its waiting items by rank, each in order of arrival."""

    weight: float
    time: float
    ranks: dict[Rank, dict[Item, None]] = field(default_factory=dict[Rank, dict[Item, None]])
    tokens: dict[Rank, int] = field(default_factory=dict[Rank, int])
    aged: float = float("-inf")
    """When its oldest item last went first."""


class FairQueue(Generic[Item]):
    """Items with their tokens, client and rank. Not thread-safe."""

    def __init__(self, aging: float) -> None:
        """aging: seconds between two starts of a client's oldest item."""
        self._aging = aging
        self._entries: dict[Item, _Entry] = {}
        self._clocks: dict[str, _Clock[Item]] = {}
        self._now = 0.0
        """The clock of the client that was served last; clients that join start here."""
        self.tokens: int = 0
        """Number of waiting tokens."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: Item) -> bool:
        return item in self._entries

    def __iter__(self) -> Iterator[Item]:
        """All items in order of arrival."""
        return iter(list(self._entries))

    def push(self, item: Item, client: Client, rank: Rank, tokens: int, since: float) -> None:
        """Add an item. since: when it arrived, in seconds."""
        clock = self._clocks.pop(client.name, None)
        if clock is None:
            clock = _Clock[Item](client.weight, self._now)
            self._forget_idle()
        elif not clock.ranks:
            clock.time = max(clock.time, self._now - _CREDIT / client.weight)
        self._clocks[client.name] = clock  # those used last are last
        clock.weight = client.weight
        clock.ranks.setdefault(rank, {})[item] = None
        clock.tokens[rank] = clock.tokens.get(rank, 0) + tokens
        self._entries[item] = _Entry(client.name, rank, tokens, since)
        self.tokens += tokens

    def start(self, item: Item) -> None:
        """Remove an item that is served now, and move its client's clock."""
        clock, entry = self._remove(item)
        clock.time += entry.tokens / clock.weight

    def drop(self, item: Item) -> None:
        """Remove an item that is not served."""
        self._remove(item)

    def lead(self, item: Item, now: float) -> None:
        """Note that an item, still waiting, goes first."""
        entry = self._entries[item]
        clock = self._clocks[entry.client]
        self._now = max(self._now, clock.time)
        if entry.rank == self._oldest_rank(clock):
            clock.aged = now

    def oldest(self) -> float | None:
        """When the oldest item arrived; None if there is none."""
        return next((entry.since for entry in self._entries.values()), None)

    def first(self, count: int, now: float) -> list[Item]:
        """The next ``count`` items in the order in which they would be served."""
        waiting = [clock for clock in self._clocks.values() if clock.ranks]
        if len(waiting) == 1:
            return list(islice(self._of_client(waiting[0], now), count))
        chosen: list[Item] = []
        heap = [(clock.time, number, self._of_client(clock, now), clock.weight) for number, clock in enumerate(waiting)]
        heapq.heapify(heap)
        while heap and len(chosen) < count:
            time, number, items, weight = heap[0]
            item = next(items, None)
            if item is None:
                heapq.heappop(heap)
                continue
            chosen.append(item)
            heapq.heapreplace(heap, (time + self._entries[item].tokens / weight, number, items, weight))
        return chosen

    def ahead(self, client: Client, rank: Rank) -> float:
        """Tokens that are served before a new item of this client and rank, roughly: its own, and the others' turns meanwhile."""
        clock = self._clocks.get(client.name)
        own = 0 if clock is None else sum(tokens for each, tokens in clock.tokens.items() if each <= rank)
        weights = sum(other.weight for other in self._clocks.values() if other.ranks and other is not clock) + client.weight
        return min(self.tokens, own * weights / client.weight)

    def _of_client(self, clock: _Clock[Item], now: float) -> Iterator[Item]:
        ranks = sorted(clock.ranks)
        if len(ranks) > 1:
            oldest = self._oldest_rank(clock)
            if oldest != ranks[0] and now - max(self._since(clock, oldest), clock.aged) >= self._aging:
                ranks.remove(oldest)
                ranks.insert(0, oldest)
        return chain.from_iterable(clock.ranks[rank] for rank in ranks)

    def _oldest_rank(self, clock: _Clock[Item]) -> Rank:
        return min(clock.ranks, key=lambda rank: self._since(clock, rank))

    def _since(self, clock: _Clock[Item], rank: Rank) -> float:
        return self._entries[next(iter(clock.ranks[rank]))].since

    def _remove(self, item: Item) -> tuple[_Clock[Item], _Entry]:
        entry = self._entries.pop(item)
        clock = self._clocks[entry.client]
        self.tokens -= entry.tokens
        clock.tokens[entry.rank] -= entry.tokens
        items = clock.ranks[entry.rank]
        del items[item]
        if not items:
            del clock.ranks[entry.rank], clock.tokens[entry.rank]
        return clock, entry

    def _forget_idle(self) -> None:
        if len(self._clocks) > _REMEMBERED:
            idle = next((name for name, clock in self._clocks.items() if not clock.ranks), None)
            if idle is not None:
                del self._clocks[idle]
