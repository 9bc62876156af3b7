"""The queue of waiting jobs, and which of them come next. Data and decisions only; pipeline.py has the lock and the threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from npu_proxy.batch import BatchShape, Encoding
from npu_proxy.engine.fair_queue import FairQueue, Rank
from npu_proxy.engine.packing import BatchPlan, aligned, plan_batch
from npu_proxy.engine.pending import Job, PendingRequest
from npu_proxy.types import Client, Lane


@dataclass(frozen=True, slots=True)
class Depth:
    """Size of the queue: distinct waiting texts and their tokens."""

    texts: int
    tokens: int


class JobQueue:
    """Waiting jobs in fair order (fair_queue.py); equal texts share one job. Not thread-safe."""

    def __init__(self, *, aging: float, window: int, align: int = 1, canary_tokens: int = 0) -> None:
        """``aging``: seconds, see FairQueue. ``window``: how many jobs, in fair order, packing may choose from.

        align: texts start at multiples of this many positions. canary_tokens: positions that a canary takes.
        """
        self._align = align
        self._canary_tokens = canary_tokens
        self._window = window
        self._waiting: FairQueue[Job] = FairQueue(aging)
        self._in_flight: dict[bytes, Job] = {}
        self.tokens: dict[Lane, int] = {Lane.INTERACTIVE: 0, Lane.BULK: 0}
        """Number of waiting tokens per lane."""
        self.merged: int = 0
        self.abandoned: int = 0

    @property
    def depth(self) -> Depth:
        """Number of jobs that have not started, and their tokens."""
        return Depth(len(self._waiting), self._waiting.tokens)

    def add(self, encoding: Encoding, request: PendingRequest, index: int, now: float) -> Job:
        """Queue a text, or join the job that embeds the same ids (and move it forward if this request is served earlier)."""
        job = self._in_flight.get(encoding.key)
        if job is None:
            job = Job(encoding, request.client, request.rank, now, [(request, index)])
            self._in_flight[encoding.key] = job
            self._push(job)
            return job
        self.merged += 1
        job.waiters.append((request, index))
        if not job.started and self._is_earlier(request, job):
            self._drop(job)
            job.client, job.rank = request.client, request.rank
            self._push(job)
        return job

    def oldest(self) -> float | None:
        """When the oldest waiting job was queued; None if the queue is empty."""
        return self._waiting.oldest()

    def ahead(self, client: Client, rank: Rank) -> float:
        """Number of waiting tokens that would be computed before a new job."""
        return self._waiting.ahead(client, rank)

    def take(self, shapes: Sequence[BatchShape], now: float) -> tuple[list[Job], BatchPlan] | None:
        """Remove the jobs of the next batch; None if the queue is empty. Returns candidates, and the plan, which indexes them."""
        candidates = self._candidates(now)
        # A text that only a device takes which is out of service now waits for it, and holds up nobody.
        candidates = candidates[self._first_that_fits(candidates, shapes) :]
        if not candidates:
            return None
        vectors = [job.encoding.vectors for job in candidates] if any(job.encoding.spans for job in candidates) else ()
        lengths = [aligned(job.encoding.tokens, self._align) for job in candidates]
        plan = plan_batch(lengths, shapes, vectors, self._canary_tokens)
        self._waiting.lead(candidates[0], now)
        for index in plan.indices:
            job = candidates[index]
            self._waiting.start(job)
            self._count(job, -1)
            job.started = True
        return candidates, plan

    def _first_that_fits(self, candidates: Sequence[Job], shapes: Sequence[BatchShape]) -> int:
        """The index of the first job that a shape can hold; their number if there is none."""

        def fits(job: Job) -> bool:
            tokens = aligned(job.encoding.tokens, self._align)
            return any(shape.positions >= tokens and shape.segments >= job.encoding.vectors for shape in shapes)

        return next((index for index, job in enumerate(candidates) if fits(job)), len(candidates))

    def finish(self, job: Job) -> Sequence[tuple[PendingRequest, int]]:
        """Remove a finished job and return the (request, index) pairs that waited for it. Later equal texts start a new job."""
        self._forget(job)
        return tuple(job.waiters)

    def abandon(self, request: PendingRequest) -> None:
        """Drop the waiting jobs that only this request, which is over, waits for."""
        for encoding in request.encodings:
            job = self._in_flight.get(encoding.key) if encoding is not None else None
            if job is not None and not job.started:
                job.waiters = [waiter for waiter in job.waiters if waiter[0] is not request]
                if not job.waiters:
                    self._abandon(job)
        for part in request.parts:
            self.abandon(part)

    def clear(self) -> None:
        """Remove every job that has not started."""
        for job in self._waiting:
            self._drop(job)
            self._forget(job)

    def _candidates(self, now: float) -> list[Job]:
        while True:
            candidates = self._waiting.first(self._window, now)
            unwanted = [job for job in candidates if not job.wanted(now)]
            if not unwanted:
                return candidates
            for job in unwanted:
                self._abandon(job)

    def _is_earlier(self, request: PendingRequest, job: Job) -> bool:
        if request.client.name == job.client.name:
            return request.rank < job.rank
        return self.ahead(request.client, request.rank) < self.ahead(job.client, job.rank)

    def _push(self, job: Job) -> None:
        self._waiting.push(job, job.client, job.rank, job.encoding.tokens, job.queued_at)
        self._count(job, 1)

    def _drop(self, job: Job) -> None:
        self._waiting.drop(job)
        self._count(job, -1)

    def _abandon(self, job: Job) -> None:
        self._drop(job)
        self._forget(job)
        self.abandoned += 1

    def _forget(self, job: Job) -> None:
        if self._in_flight.get(job.encoding.key) is job:
            del self._in_flight[job.encoding.key]

    def _count(self, job: Job, sign: int) -> None:
        in_bulk, _ = job.rank
        self.tokens[Lane.BULK if in_bulk else Lane.INTERACTIVE] += sign * job.encoding.tokens
