"""The jobs that wait, and which of them goes next. Data and decisions only: engine/pipeline.py holds the lock and the threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from npu_proxy.engine.packing import Plan, plan_row, room
from npu_proxy.types import Encoding, Job, Lane, Shaped, Ticket


@dataclass(frozen=True, slots=True)
class Depth:
    """How much waits: distinct texts and their tokens."""

    items: int
    tokens: int


def leading_lane(*, now: float, oldest_bulk: float | None, last_bulk: float, aging: float, interactive: bool) -> Lane | None:
    """Whose oldest job opens the next row; None when nothing waits.

    Interactive goes first, but once bulk work has waited ``aging`` seconds without opening a row, it opens one. So
    bulk moves at least every ``aging`` seconds, and a deep bulk backlog delays an interactive text by one row at most.
    """
    if oldest_bulk is None:
        return Lane.INTERACTIVE if interactive else None
    overdue = now - max(oldest_bulk, last_bulk) >= aging
    return Lane.BULK if overdue or not interactive else Lane.INTERACTIVE


@dataclass(slots=True)
class Speed:
    """How fast rows have gone lately; older ones count less and less."""

    tokens: float = 0.0
    texts: float = 0.0
    seconds: float = 0.0

    def row(self, *, tokens: int, texts: int, seconds: float) -> None:
        """A row was inferred; seconds since the one before it, or of its own where the device was idle in between."""
        self.tokens = _FADE * self.tokens + tokens
        self.texts = _FADE * self.texts + texts
        self.seconds = _FADE * self.seconds + seconds

    @property
    def tokens_a_second(self) -> float:
        """Of all streams together; 0 before the first row."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_a_text(self) -> float:
        """Mean length; 0 before the first row."""
        return self.tokens / self.texts if self.texts else 0.0


_FADE = 0.98
"""What a row still counts after the next one."""


def expected_wait(
    lane: Lane, tokens: Mapping[Lane, int], untokenized: Mapping[Lane, int], tokens_a_text: float, speed: float
) -> float:
    """Seconds until what comes now is inferred; 0 where nothing is known yet.

    tokens: that wait, a lane. untokenized: texts on their way to the queue, those that come now too. speed: tokens a second.
    Interactive texts wait for their own lane only, bulk ones for both.
    """
    ahead = [lane] if lane is Lane.INTERACTIVE else list(Lane)
    waiting = sum(tokens[one] + untokenized[one] * tokens_a_text for one in ahead)
    return waiting / speed if speed else 0.0


class JobQueue:
    """Two lanes of jobs in order of arrival; equal texts in flight share one job. Not thread-safe."""

    def __init__(self, *, aging: float, window: int, align: int = 1) -> None:
        """``aging``: seconds, see leading_lane. ``window``: how many jobs in order of arrival packing may choose from.

        align: texts begin at multiples of so many positions.
        """
        self._aging = aging
        self._align = align
        self._window = window
        self._lanes: dict[Lane, dict[Job, None]] = {Lane.INTERACTIVE: {}, Lane.BULK: {}}
        self._in_flight: dict[bytes, Job] = {}
        self._last_bulk = float("-inf")
        self.tokens = {Lane.INTERACTIVE: 0, Lane.BULK: 0}
        """Tokens that wait, a lane."""
        self.merged = 0
        self.abandoned = 0

    @property
    def depth(self) -> Depth:
        """Jobs that have not started."""
        return Depth(sum(map(len, self._lanes.values())), sum(self.tokens.values()))

    def add(self, encoding: Encoding, ticket: Ticket, index: int, lane: Lane, now: float) -> Job:
        """Queue a text, or join the job that embeds the same ids already (and lift it into the faster lane)."""
        key = encoding.key
        job = self._in_flight.get(key)
        if job is None:
            job = Job(encoding=encoding, lane=lane, queued_at=now, waiters=[(ticket, index)])
            self._in_flight[key] = self._put(job)
            return job
        self.merged += 1
        job.waiters.append((ticket, index))
        if lane is Lane.INTERACTIVE and job.lane is Lane.BULK:
            if not job.started:
                del self._lanes[Lane.BULK][job]
                self._lanes[Lane.INTERACTIVE][job] = None
                self.tokens[Lane.BULK] -= encoding.tokens
                self.tokens[Lane.INTERACTIVE] += encoding.tokens
            job.lane = lane
        return job

    def oldest(self) -> float | None:
        """When the job that has waited longest was queued."""
        firsts = [next(iter(lane)).queued_at for lane in self._lanes.values() if lane]
        return min(firsts, default=None)

    def take(self, shapes: Sequence[Shaped], now: float) -> tuple[list[Job], Plan] | None:
        """Remove and return the jobs of the next row, in the order the plan counts them; None when nothing waits.

        Jobs that nobody waits for any more are dropped on the way (their tickets have been answered already).
        """
        candidates = self._candidates(now)
        if not candidates:
            return None
        answers = [job.encoding.answers for job in candidates] if any(job.encoding.parts for job in candidates) else ()
        plan = plan_row([room(job.encoding.tokens, self._align) for job in candidates], shapes, answers)
        for index in chain.from_iterable(plan.bins):
            self._start(candidates[index])
        if candidates[0].lane is Lane.BULK:
            self._last_bulk = now
        return candidates, plan

    def finish(self, job: Job) -> Sequence[tuple[Ticket, int]]:
        """The job has its answer: forget it, and say who waits. Later equal texts start a new job."""
        key = job.encoding.key
        if self._in_flight.get(key) is job:
            del self._in_flight[key]
        return tuple(job.waiters)

    def clear(self) -> list[Job]:
        """Remove every job that has not started."""
        jobs = [job for lane in self._lanes.values() for job in lane]
        for job in jobs:
            self._drop(job)
        return jobs

    def _candidates(self, now: float) -> list[Job]:
        interactive, bulk = self._lanes[Lane.INTERACTIVE], self._lanes[Lane.BULK]
        for job in [job for job in islice(chain(interactive, bulk), 2 * self._window) if not job.wanted(now)]:
            self._drop(job)
            self.abandoned += 1
        lane = leading_lane(
            now=now,
            oldest_bulk=next(iter(bulk)).queued_at if bulk else None,
            last_bulk=self._last_bulk,
            aging=self._aging,
            interactive=bool(interactive),
        )
        first, second = (bulk, interactive) if lane is Lane.BULK else (interactive, bulk)
        return list(islice(chain(first, second), self._window))

    def _put(self, job: Job) -> Job:
        self._lanes[job.lane][job] = None
        self.tokens[job.lane] += job.encoding.tokens
        return job

    def _start(self, job: Job) -> None:
        del self._lanes[job.lane][job]
        self.tokens[job.lane] -= job.encoding.tokens
        job.started = True

    def _drop(self, job: Job) -> None:
        self._start(job)
        self.finish(job)
