"""The queue of waiting jobs, and which of them come next. Data and decisions only; pipeline.py has the lock and the threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

from npu_proxy.batch import BatchShape, Encoding
from npu_proxy.engine.packing import BatchPlan, aligned, plan_batch
from npu_proxy.engine.pending import Job, PendingRequest
from npu_proxy.types import Lane


@dataclass(frozen=True, slots=True)
class Depth:
    """Size of the queue: distinct waiting texts and their tokens."""

    texts: int
    tokens: int


def next_lane(*, now: float, oldest_bulk: float | None, last_bulk: float, aging: float, interactive: bool) -> Lane | None:
    """The lane whose oldest job starts the next batch; None if the queue is empty.

    The interactive lane goes first, unless bulk jobs have waited ``aging`` seconds without starting a batch. So the bulk lane
    advances at least every ``aging`` seconds, and a long bulk backlog delays an interactive text by at most one batch.
    """
    if oldest_bulk is None:
        return Lane.INTERACTIVE if interactive else None
    overdue = now - max(oldest_bulk, last_bulk) >= aging
    return Lane.BULK if overdue or not interactive else Lane.INTERACTIVE


class JobQueue:
    """Two lanes of jobs in order of arrival; equal texts share one job. Not thread-safe."""

    def __init__(self, *, aging: float, window: int, align: int = 1, canary_tokens: int = 0) -> None:
        """``aging``: seconds, see next_lane. ``window``: how many jobs, in order of arrival, packing may choose from.

        align: texts start at multiples of this many positions. canary_tokens: positions that a canary takes.
        """
        self._aging = aging
        self._align = align
        self._canary_tokens = canary_tokens
        self._window = window
        self._lanes: dict[Lane, dict[Job, None]] = {Lane.INTERACTIVE: {}, Lane.BULK: {}}
        self._in_flight: dict[bytes, Job] = {}
        self._last_bulk = float("-inf")
        self.tokens: dict[Lane, int] = {Lane.INTERACTIVE: 0, Lane.BULK: 0}
        """Number of waiting tokens per lane."""
        self.merged: int = 0
        self.abandoned: int = 0

    @property
    def depth(self) -> Depth:
        """Number of jobs that have not started, and their tokens."""
        return Depth(sum(map(len, self._lanes.values())), sum(self.tokens.values()))

    def add(self, encoding: Encoding, request: PendingRequest, index: int, lane: Lane, now: float) -> Job:
        """Queue a text, or join the job that already embeds the same ids (moving it to the interactive lane if needed)."""
        key = encoding.key
        job = self._in_flight.get(key)
        if job is None:
            job = Job(encoding=encoding, lane=lane, queued_at=now, waiters=[(request, index)])
            self._in_flight[key] = self._put(job)
            return job
        self.merged += 1
        job.waiters.append((request, index))
        if lane is Lane.INTERACTIVE and job.lane is Lane.BULK:
            if not job.started:
                del self._lanes[Lane.BULK][job]
                self._lanes[Lane.INTERACTIVE][job] = None
                self.tokens[Lane.BULK] -= encoding.tokens
                self.tokens[Lane.INTERACTIVE] += encoding.tokens
            job.lane = lane
        return job

    def oldest(self) -> float | None:
        """When the oldest waiting job was queued; None if the queue is empty."""
        firsts = [next(iter(lane)).queued_at for lane in self._lanes.values() if lane]
        return min(firsts, default=None)

    def take(self, shapes: Sequence[BatchShape], now: float) -> tuple[list[Job], BatchPlan] | None:
        """Remove the jobs of the next batch; None if the queue is empty. Returns the candidates and the plan, which indexes them.

        Jobs that no request waits for any more are dropped (their requests are already finished).
        """
        candidates = self._candidates(now)
        if not candidates:
            return None
        vectors = [job.encoding.vectors for job in candidates] if any(job.encoding.spans for job in candidates) else ()
        lengths = [aligned(job.encoding.tokens, self._align) for job in candidates]
        plan = plan_batch(lengths, shapes, vectors, self._canary_tokens)
        for index in plan.indices:
            self._start(candidates[index])
        if candidates[0].lane is Lane.BULK:
            self._last_bulk = now
        return candidates, plan

    def finish(self, job: Job) -> Sequence[tuple[PendingRequest, int]]:
        """Remove a finished job and return the (request, index) pairs that waited for it. Later equal texts start a new job."""
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
        lane = next_lane(
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
