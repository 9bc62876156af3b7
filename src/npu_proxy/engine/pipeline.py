"""The three stages and the threads that move texts through them: tokenize, infer (one thread a device stream), finish.

Decisions are elsewhere (queue.py, packing.py). A stage cannot die: whatever its step raises fails the jobs in its hands
and the stage goes on. One lock guards all shared state; nothing slow happens under it. Every wait has a limit.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from npu_proxy.cache.vectors import VectorCache
from npu_proxy.devices.base import Device, own
from npu_proxy.engine.answers import answer_of, apart, combine
from npu_proxy.engine.counters import Counters, Stats
from npu_proxy.engine.manner import Manner
from npu_proxy.engine.packing import Plan, full_row, pack
from npu_proxy.engine.queue import JobQueue, Speed, expected_wait
from npu_proxy.engine.tokenize import TextEncoder
from npu_proxy.errors import DeadlineError, DeviceError, NpuProxyError, OverloadedError, StoppedError
from npu_proxy.graph.packed import RowFormat
from npu_proxy.types import Chunked, Embedded, Encoding, Job, Lane, ModelSpec, Output, Pack, Pair, Ticket, Vector

log = logging.getLogger("npu_proxy.engine")

HANDOFF_SECONDS = 0.5
"""No wait between stages is longer; after it the stage looks whether it should stop."""
_CHUNK = 64
"""Texts tokenized at once, so that an interactive text waits for one chunk of a bulk request at most."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the pipeline must know of the settings; seconds, texts and tokens."""

    batch_delay: float
    aging: float
    window: int
    max_items: int
    max_tokens: int


_HURRY = 0.7
"""Share of its time that a request may be expected to wait; beyond it the request is refused at once."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some texts of a ticket, on their way to the tokenizer."""

    ticket: Ticket
    manner: Manner
    lane: Lane
    indices: Sequence[int]


class Pipeline:
    """Takes tickets, answers each of their texts exactly once. Thread-safe."""

    def __init__(
        self, encoder: TextEncoder, device: Device, spec: ModelSpec, limits: Limits, cache: VectorCache | None = None
    ) -> None:
        self._encoder = encoder
        self._cache = cache
        self._device = device
        self._spec = spec
        self._layout = RowFormat.of(spec)
        self._limits = limits
        self._lock = threading.Lock()
        self._texts_came = threading.Condition(self._lock)
        self._jobs_came = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._chunks: dict[Lane, deque[_Chunk]] = {Lane.INTERACTIVE: deque(), Lane.BULK: deque()}
        self._tokenizing = 0
        self._speed = Speed()
        self._last_row = 0.0
        self._rows = 0
        self._jobs = JobQueue(aging=limits.aging, window=limits.window, align=self._layout.align)
        self._tickets: dict[int, Ticket] = {}
        self._open_texts = 0
        self._deadlines: list[tuple[float, int]] = []
        self._order = itertools.count()
        self._done: queue.SimpleQueue[tuple[Pack, Output | NpuProxyError] | None] = queue.SimpleQueue()
        self._counters = Counters()
        self._accepting = True
        self._stopping = threading.Event()
        steps: list[tuple[str, Callable[[], None]]] = [("tokenize", self._tokenize), ("finish", self._finish)]
        steps += [(f"infer-{number}", self._infer) for number in range(device.most_streams)]
        self._threads = [threading.Thread(target=self._run, args=step, name=f"npu-proxy-{step[0]}", daemon=True) for step in steps]
        for thread in self._threads:
            thread.start()

    # -- the door ------------------------------------------------------------------------------------------------

    def submit(self, ticket: Ticket, manner: Manner, lane: Lane) -> None:
        """Take a ticket in. Raises OverloadedError past the queue's limits, StoppedError when not running."""
        left = [index for index, answer in enumerate(ticket.answers) if answer is None]
        count = len(left)
        with self._lock:
            if not self._accepting:
                raise StoppedError("the engine is stopping or stopped; start it before sending texts")
            try:
                self._admit(count, lane, ticket.deadline - ticket.submitted_at)
            except OverloadedError:
                self._counters.refused += 1
                raise
            self._counters.requests += 1
            ticket.number, ticket.queued = next(self._order), count
            self._tickets[ticket.number] = ticket
            self._open_texts += count
            heapq.heappush(self._deadlines, (ticket.deadline, ticket.number))
            if self._deadlines[0][1] == ticket.number:
                self._done.put(None)  # the finish stage waits for a later one
            for start in range(0, count, _CHUNK):
                self._chunks[lane].append(_Chunk(ticket, manner, lane, left[start : start + _CHUNK]))
            self._texts_came.notify()

    def _admit(self, count: int, lane: Lane, seconds: float) -> None:
        """Raise OverloadedError for ``count`` texts that there is no room for, or that would wait most of their ``seconds``."""
        if not self._open_texts:
            return  # what is too much for an idle engine is for its deadline to say
        tokens, limits = self._jobs.depth.tokens, self._limits
        speed = self._speed.tokens_a_second
        if self._open_texts + count > limits.max_items or tokens > limits.max_tokens:
            raise OverloadedError(
                f"the queue is full ({self._open_texts} texts of at most {limits.max_items}, {tokens} tokens of at"
                f" most {limits.max_tokens}); try again later, or raise `max_queue_items` or `max_queue_tokens`",
                retry_after=max(1.0, tokens / speed) if speed else 1.0,
            )
        # What the disk or a server knows costs no inference, and nobody has looked yet.
        deep = self._cache is not None and self._cache.deep
        untokenized = {one: 0 if deep else sum(len(chunk.indices) for chunk in chunks) for one, chunks in self._chunks.items()}
        untokenized[lane] += 0 if deep else count
        wait = expected_wait(lane, self._jobs.tokens, untokenized, self._speed.tokens_a_text, speed)
        if wait > _HURRY * seconds > 0:  # without any time left it is the deadline that ends it
            raise OverloadedError(
                f"the queue is {wait:.1f} seconds long, too long for a request that has {seconds:.3g}; try again later,"
                " or give it more time",
                retry_after=max(1.0, wait - _HURRY * seconds),
            )

    def forget(self, ticket: Ticket) -> None:
        """A ticket has all its answers; called by its ``done``."""
        with self._lock:
            if self._tickets.pop(ticket.number, None) is None:
                return
            self._open_texts -= ticket.queued
            for error in filter(None, ticket.errors):
                self._counters.error(error.kind)
            if not self._tickets:
                self._idle.notify_all()

    def stats(self) -> Stats:
        """A consistent copy of the counters and what waits."""
        with self._lock:
            copy = self._counters.copy(merged=self._jobs.merged, abandoned=self._jobs.abandoned)
            return Stats(
                counters=copy,
                depth=self._jobs.depth,
                lane_tokens=dict(self._jobs.tokens),
                open_texts=self._open_texts,
                stages={thread.name.removeprefix("npu-proxy-"): thread.is_alive() for thread in self._threads},
            )

    def stop(self, drain: float) -> None:
        """Refuse new tickets, give the open ones ``drain`` seconds, fail the rest, end the threads."""
        with self._lock:
            self._accepting = False
            self._idle.wait_for(lambda: not self._tickets, timeout=drain)
            self._stopping.set()
            self._texts_came.notify_all()
            self._jobs_came.notify_all()
        self._done.put(None)  # wakes the finish stage
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10 * HANDOFF_SECONDS)
        with self._lock:
            self._jobs.clear()
            left = list(self._tickets.values())
        for ticket in left:
            ticket.fail_all(StoppedError("the engine was stopped before this text was embedded"))

    # -- the stages ----------------------------------------------------------------------------------------------

    def _run(self, name: str, step: Callable[[], None]) -> None:
        while not self._stopping.is_set():
            try:
                step()
            except BaseException:  # a stage never dies; its step has failed the jobs it held
                log.exception("stage %s: unexpected error, going on", name)
                with self._lock:
                    self._counters.faults += 1
                self._stopping.wait(0.01)

    def _tokenize(self) -> None:
        with self._lock:
            lanes = self._chunks
            self._texts_came.wait_for(lambda: any(lanes.values()) or self._stopping.is_set(), timeout=HANDOFF_SECONDS)
            lane = lanes[Lane.INTERACTIVE] or lanes[Lane.BULK]
            if not lane or self._stopping.is_set():
                return
            chunk = lane.popleft()
            self._tokenizing += 1
        encodings: Sequence[Encoding | Chunked | NpuProxyError] = ()
        try:
            ticket, start = chunk.ticket, time.monotonic()
            if ticket.open and not ticket.abandoned():
                chunk = self._without_cached(chunk)
                texts = [ticket.request.texts[index] for index in chunk.indices]
                encodings = self._encoder.encode(texts, chunk.manner)
                ticket.tokenize_seconds += time.monotonic() - start
            elif ticket.abandoned():
                with self._lock:
                    self._jobs.abandoned += len(chunk.indices)
        except BaseException as error:  # these texts fail, the stage goes on; a panic in Rust is no Exception
            encodings = [_wrapped(error, "tokenizing failed")] * len(chunk.indices)
        finally:
            self._enqueue(chunk, encodings)

    def _without_cached(self, chunk: _Chunk) -> _Chunk:
        """The chunk without the texts that the disk or a server knows, which are answered."""
        if self._cache is None or not self._cache.deep or not chunk.ticket.keys:
            return chunk
        found = self._cache.fetch([chunk.ticket.keys[index] for index in chunk.indices], self._text_seconds())
        chunk.ticket.recall(zip(chunk.indices, found, strict=True))
        left = [index for index, entry in zip(chunk.indices, found, strict=True) if entry is None]
        return replace(chunk, indices=left)

    def _text_seconds(self) -> float:
        """What a text costs on the device; 0 before the first row."""
        counters = self._counters
        return counters.infer_seconds / counters.texts / self._device.streams if counters.texts else 0.0

    def _enqueue(self, chunk: _Chunk, encodings: Sequence[Encoding | Chunked | NpuProxyError]) -> None:
        ticket, now = chunk.ticket, time.monotonic()
        with self._lock:
            self._tokenizing -= 1
            for index, encoding in zip(chunk.indices, encodings, strict=False):
                if isinstance(encoding, Encoding):
                    ticket.encodings[index] = encoding
                    self._jobs.add(encoding, ticket, index, chunk.lane, now)
                elif isinstance(encoding, Chunked):
                    parts = self._parts(ticket, index, encoding)
                    for number, part in enumerate(encoding.encodings):
                        self._jobs.add(part, parts, number, chunk.lane, now)
            self._jobs_came.notify_all()
        for index, encoding in zip(chunk.indices, encodings, strict=False):
            if isinstance(encoding, NpuProxyError):
                ticket.fail(index, encoding)

    def _parts(self, ticket: Ticket, index: int, chunked: Chunked) -> Ticket:
        """A ticket for the chunks of one text, whose answers become that text's."""

        def done(parts: Ticket) -> None:
            for error in filter(None, parts.errors):
                ticket.fail(index, error)
                return
            made = [answer for answer in parts.answers if answer is not None]
            answers = [one for answer, encoding in zip(made, chunked.encodings, strict=True) for one in apart(answer, encoding)]
            pair = isinstance(ticket.request.texts[index], Pair)
            ticket.fallbacks |= parts.fallbacks
            ticket.queued_seconds = max(ticket.queued_seconds, parts.queued_seconds)
            ticket.infer_seconds += parts.infer_seconds
            self._settle(ticket, index, combine(self._spec, answers, chunked.spans, pair=pair))

        request = replace(ticket.request, texts=[""] * len(chunked.encodings))
        parts = Ticket(request, ticket.deadline, ticket.submitted_at, done, lambda: not ticket.open or ticket.abandoned())
        parts.encodings = list(chunked.encodings)
        return parts

    def _settle(self, ticket: Ticket, index: int, answer: Embedded) -> None:
        """Give a text its answer, and remember it."""
        if self._cache is not None and ticket.keys:
            self._cache.keep(ticket.keys[index], replace(answer, chunks=()) if answer.chunks else answer)
        ticket.answer(index, answer)

    def _infer(self) -> None:
        taken = self._take()
        if taken is None:
            return
        try:
            self._done.put(self._compute(*taken))
        finally:
            with self._lock:
                self._rows -= 1
                self._jobs_came.notify()

    def _compute(self, jobs: Sequence[Job], plan: Plan) -> tuple[Pack, Output | NpuProxyError]:
        row = Pack([jobs[index] for bin in plan.bins for index in bin], (), plan.shape, {})
        answer: Output | NpuProxyError
        try:
            row = pack(jobs, plan, self._layout, self._spec.kind)
            answer = self._device.infer(row)
        except BaseException as error:  # these jobs fail, the stage goes on
            answer = _wrapped(error, "the device failed")
        return row, answer

    def _take(self) -> tuple[list[Job], Plan] | None:
        """The next row, when there is work and (if company is coming) the batch delay of the oldest job is over.

        There are threads for the device with most streams; with another one in front, the rest of them waits here.
        """
        with self._lock:
            self._jobs_came.wait_for(lambda: self._room() or self._stopping.is_set(), HANDOFF_SECONDS)
            oldest = self._jobs.oldest()
            if oldest is not None and not self._enough() and self._company():
                due = oldest + self._limits.batch_delay
                self._jobs_came.wait_for(self._wait_is_over, timeout=max(0.0, min(HANDOFF_SECONDS, due - time.monotonic())))
            if self._stopping.is_set() or not self._room():
                return None
            taken = self._jobs.take(self._device.shapes, time.monotonic())
            self._rows += taken is not None
            return taken

    def _room(self) -> bool:
        return self._rows < self._device.streams and self._jobs.oldest() is not None

    def _enough(self) -> bool:
        """Whether a full row waits."""
        full = full_row(self._device.shapes)
        return self._jobs.depth.tokens >= full.bins * full.positions

    def _wait_is_over(self) -> bool:
        return self._stopping.is_set() or self._enough() or not self._company()

    def _company(self) -> bool:
        """Whether further texts are on their way to the queue."""
        return bool(self._tokenizing or any(self._chunks.values()))

    def _finish(self) -> None:
        with self._lock:
            next_deadline = self._deadlines[0][0] if self._deadlines else float("inf")
        try:
            wait = min(HANDOFF_SECONDS, max(0.001, next_deadline - time.monotonic()))
            done = self._done.get(timeout=wait)
        except queue.Empty:
            done = None
        if done is not None:
            self._answer(*done)
        self._expire(time.monotonic())

    def _answer(self, row: Pack, answer: Output | NpuProxyError) -> None:
        with self._lock:
            waiters = [self._jobs.finish(job) for job in row.jobs]
            if isinstance(answer, Output):
                self._count(row, answer)
        now = time.monotonic()
        for number, (job, who) in enumerate(zip(row.jobs, waiters, strict=True)):
            try:
                outcome = answer if isinstance(answer, NpuProxyError) else self._answer_of(answer, row, number)
            except Exception as error:  # this text fails, its row goes on
                outcome = _wrapped(error, "finishing failed")
            for ticket, index in who:
                if isinstance(outcome, NpuProxyError):
                    ticket.fail(index, outcome)
                    continue
                assert isinstance(answer, Output)
                if answer.fallback:
                    ticket.fallbacks.add(answer.fallback)
                ticket.queued_seconds = max(ticket.queued_seconds, now - answer.seconds - job.queued_at)
                ticket.infer_seconds += answer.seconds * job.encoding.tokens / max(1, row.tokens)
                known = ticket.encodings[index]
                embedded = Embedded(outcome, job.encoding.tokens, bool(known and known.truncated), answer.device)
                self._settle(ticket, index, embedded)

    def _answer_of(self, answer: Output, row: Pack, number: int) -> Vector | DeviceError:
        """What is kept of the answer to a row's job, or the DeviceError that its numbers are not finite."""
        raw = own(row, number, answer.vectors)
        if not np.isfinite(raw).all():
            return DeviceError(f"device {answer.device} answered with numbers that are not finite")
        return answer_of(self._spec, row.jobs[number].encoding, raw, self._encoder.special_ids)

    def _count(self, row: Pack, answer: Output) -> None:
        counters = self._counters
        now = time.monotonic()
        if self._tells(row):
            self._speed.row(tokens=row.tokens, texts=len(row.jobs), seconds=min(answer.seconds, now - self._last_row))
        self._last_row = now
        counters.row(row, answer)

    def _tells(self, row: Pack) -> bool:
        """Whether a row says how fast a queue goes: full ones do, of the small ones of a shallow queue a token takes far longer."""
        full = full_row(self._device.shapes)
        tokens, texts = full.bins * full.positions, full.bins * full.segments
        return 2 * row.tokens >= tokens or 2 * len(row.jobs) >= texts

    def _expire(self, now: float) -> None:
        """Answer the tickets whose time ran out; their jobs are dropped when they would come up."""
        expired: list[Ticket] = []
        with self._lock:
            while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1] not in self._tickets):
                ticket = self._tickets.get(heapq.heappop(self._deadlines)[1])
                if ticket is not None:
                    expired.append(ticket)
        for ticket in expired:
            if ticket.open:
                seconds = ticket.deadline - ticket.submitted_at
                late = (
                    f"no answer within {seconds:.3g} seconds" if seconds > 0 else "the time was over before the texts were queued"
                )
                ticket.fail_all(DeadlineError(f"{late}; raise the timeout, or send fewer texts at once"))


def _wrapped(error: BaseException, what: str) -> NpuProxyError:
    if isinstance(error, NpuProxyError):
        return error
    log.error("%s", what, exc_info=error)
    return NpuProxyError(f"{what}: {type(error).__name__}")
