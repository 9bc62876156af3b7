"""A queue in which clients take turns by tokens, and each client's own items go by lane, size and age. Data and decisions only.

Between clients: start-time fair queueing. Each client has a clock, which each started item moves forward by its tokens divided by
the client's weight; the client whose clock is furthest behind is next. So clients that always have something waiting get equal
shares, however many requests they have open, and one that sends little never waits for the backlog of another.

Within a client: the interactive lane first, then smaller requests, in order of arrival among requests of similar size; but at
least every ``aging`` seconds its oldest item goes first, so that none starves. This decides which item leads a batch; the others
are taken by age, as a mixture of sizes fills a batch best.

Source: Goyal, Vin and Cheng 1996 (start-time fair queueing).
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Generic, TypeVar

from npu_proxy.types import Client, Lane

_CREDIT = 4096
"""Tokens of its share that a client may catch up on if it had nothing waiting for a moment, as between two requests."""
_SMALL_BITS = 5
_REMEMBERED = 1024
"""Number of clients without waiting items whose clocks are kept."""

Rank = tuple[bool, int]
"""Order within a client: whether the request is in the bulk lane, and its size class; the lowest goes first."""

Item = TypeVar("Item", bound=Hashable)


def rank_of(lane: Lane, tokens: int) -> Rank:
    """The rank of a request. tokens: of all its texts, roughly. Sizes below 64, from 64 to 255, from 256 to 1,023, ... are equal.

    Finer classes would use up the shortest texts first, which fill the gaps between longer ones best.
    """
    return (lane is Lane.BULK, max(0, tokens.bit_length() - _SMALL_BITS) // 2)


@dataclass(frozen=True, slots=True)
class _Entry:
    client: str
    rank: Rank
    tokens: int
    since: float


@dataclass(slots=True)
class _Clock(Generic[Item]):
    """A client's share: its clock, and its waiting items by lane and by rank, each in order of arrival."""

    weight: float
    time: float
    lanes: dict[bool, dict[Item, None]] = field(default_factory=lambda: {False: {}, True: {}})
    """Its waiting items by lane (whether bulk), in order of arrival."""
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
        clock.lanes[rank[0]][item] = None
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
        """The item whose turn it is, and up to ``count`` - 1 others that could be served with it.

        The others are in the order of the clients' turns, of the same client by lane and then by age, whatever their size: batches
        are filled best from a mixture of sizes.
        """
        waiting = [clock for clock in self._clocks.values() if clock.ranks]
        if not waiting:
            return []
        first = min(waiting, key=lambda clock: clock.time)
        lead = self._lead(first, now)
        if count == 1:
            return [lead]
        if len(waiting) == 1:
            others: Iterator[Item] = chain.from_iterable(first.lanes.values())
        else:
            others = self._in_turns(waiting, first, self._entries[lead].tokens)
        return [lead, *islice((item for item in others if item is not lead), count - 1)]

    def _in_turns(self, waiting: Sequence[_Clock[Item]], first: _Clock[Item], started: int) -> Iterator[Item]:
        """The items of several clients as their clocks would run. started: tokens of an item of ``first`` that is served before."""
        heap = [
            (clock.time + (started / clock.weight if clock is first else 0.0), number, chain.from_iterable(clock.lanes.values()))
            for number, clock in enumerate(waiting)
        ]
        heapq.heapify(heap)
        while heap:
            time, number, items = heap[0]
            item = next(items, None)
            if item is None:
                heapq.heappop(heap)
                continue
            yield item
            heapq.heapreplace(heap, (time + self._entries[item].tokens / waiting[number].weight, number, items))

    def ahead(self, client: Client, rank: Rank) -> float:
        """Tokens that are served before a new item of this client and rank, roughly: its own, and the others' turns meanwhile."""
        clock = self._clocks.get(client.name)
        own = 0 if clock is None else sum(tokens for each, tokens in clock.tokens.items() if each <= rank)
        weights = sum(other.weight for other in self._clocks.values() if other.ranks and other is not clock) + client.weight
        return min(self.tokens, own * weights / client.weight)

    def _lead(self, clock: _Clock[Item], now: float) -> Item:
        """The item of a client that is served first."""
        rank = min(clock.ranks)
        if len(clock.ranks) > 1:
            oldest = self._oldest_rank(clock)
            if now - max(self._since(clock, oldest), clock.aged) >= self._aging:
                rank = oldest
        return next(iter(clock.ranks[rank]))

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
        del items[item], clock.lanes[entry.rank[0]][item]
        if not items:
            del clock.ranks[entry.rank], clock.tokens[entry.rank]
        return clock, entry

    def _forget_idle(self) -> None:
        if len(self._clocks) > _REMEMBERED:
            idle = next((name for name, clock in self._clocks.items() if not clock.ranks), None)
            if idle is not None:
                del self._clocks[idle]
